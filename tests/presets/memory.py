"""Where the weights of the suite lie: in numpy's arrays, or, with RESHARD_MEMORY=cuda, in the memory of GPUs and in pinned host memory.

Tests know arrays alone. With cuda each has a block behind it, which the library gets in its place: a sync first puts there, on its own
stream, what the rank's arrays hold, poison too, and brings targets back when all ranks have landed.
"""

import ctypes as c
import os
import sys
import weakref
import zlib

import gpu
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../cpp_examples"))
import reshard  # noqa: E402
from reshard import BF16, SOURCE, TARGET  # noqa: E402

place = os.environ.get("RESHARD_MEMORY", "host")
if place not in ("host", "cuda"):
    sys.exit(f"RESHARD_MEMORY is '{place}'; it is host or cuda")
on_gpus = place == "cuda"
between_processes = False  # which can map only such host memory as the library gives out
reshard._lib.rs_container_rebind.argtypes = [c.c_void_p, c.c_void_p, c.c_void_p]
reshard._lib.rs_mem_alloc.argtypes = [c.c_uint64, c.c_uint32, c.c_void_p]
reshard._lib.rs_mem_free.argtypes, reshard._lib.rs_mem_free.restype = [c.c_void_p], None
blocks = {}  # by the number of an array that owns its memory: what is behind it, by GPU


class Shared(gpu.Pinned):
    """Pinned memory of rs_mem_alloc()."""

    def take(self):
        at = c.c_void_p()
        reshard._check(reshard._lib.rs_mem_alloc(self.size, 0, c.byref(at)))
        gpu.call("cuMemHostRegister_v2", at, c.c_size_t(self.size), 0)
        return at.value

    def give_back(self):
        gpu.call("cuMemHostUnregister", c.c_void_p(self.at))
        reshard._lib.rs_mem_free(self.at)


def owner(array):
    """The array that has the memory of a view: a view's block is a part of that array's."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def block_of(array, number, kind):
    """What is behind an array on this GPU, made where it is not there: lives as long as the array."""
    whole = owner(array)
    if id(whole) not in blocks:
        blocks[id(whole)] = {}
        weakref.finalize(whole, give_back, id(whole))
    behind = blocks[id(whole)]
    if number not in behind:
        behind[number] = kind(number, whole.nbytes)
    return behind[number]


def give_back(key):
    for block in blocks.pop(key).values():
        block.free()


def copy(arrays, to_gpus):
    """All bytes between arrays and what is behind them, outside of syncs."""
    for array in arrays:
        for number, block in blocks.get(id(owner(array)), {}).items():
            stream = gpu.Stream(number)
            (block.write if to_gpus else block.read)(owner(array), stream)
            stream.close()


class Preset(reshard.Preset):
    """All parameters of a rank are on one GPU, of some ranks with the sources in pinned memory: which, the model's text says."""

    def __init__(self, spec, rank):
        super().__init__(spec, rank)
        if on_gpus:
            drawn = zlib.crc32(repr(spec).encode()) + rank
            self.gpu, self._pins = drawn % gpu.count(), drawn % 3 == 0

    def bind(self, name, array, role, dtype=BF16, chunk=0):
        at = None
        if on_gpus:
            pinned = Shared if between_processes else gpu.Pinned
            block = block_of(array, self.gpu, pinned if self._pins and role == SOURCE else gpu.Block)
            at = block.at + array.ctypes.data - owner(array).ctypes.data, block.kind, self.gpu
        super().bind(name, array, role, dtype, chunk, at)

    def blocks(self, roles=SOURCE | TARGET):
        """The arrays that are bound in some of these roles, and their blocks; none twice."""
        arrays = [owner(array) for (_, role, _), array in self._arrays.items() if role & roles]
        return {id(array): (array, blocks[id(array)][self.gpu]) for array in arrays}.values()


class Container(reshard.Container):
    """Of such a preset."""

    def rebind(self, preset):
        reshard._check(reshard._lib.rs_container_rebind(self._handle, None, preset._handle))
        self._layout = preset

    def move(self, version, progress=lambda done, total: None, only=(), stream=None, verify=False):
        if not on_gpus:
            return super().move(version, progress, only, verify=verify)
        stream = gpu.Stream(self._layout.gpu)
        try:
            for array, block in self._layout.blocks():
                block.write(array, stream)
            super().move(version, progress, only, stream.handle, verify)
            for array, block in self._layout.blocks(TARGET):
                block.read(array, stream)
        finally:
            stream.close()
