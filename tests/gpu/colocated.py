"""A colocated sync of Qwen2.5-7B between processes that share one GPU, checked and timed: colocated.py

Four trainers, Megatron's TP 2 and PP 2, and an engine, vLLM's TP 1, in five processes over rs_comm_local(), each with its own weights on the
GPU that CUDA counts as 0: the engine's kernel reads the trainers' memory by CUDA's IPC handles. Every element of the engine is compared
after the first sync and after the last, before which the trainers' streams still write. Between them syncs and device-to-device memcpys of
as many bytes take turns; medians. Where the GPU has not enough memory it says so and ends. Wants numpy; RESHARD_LIBRARY is the library, as
for reshard.py.

RESHARD_BENCH=tiny: a small model of the same architecture, for runs that only compare bytes (stand-in driver).
"""

import ctypes as c
import json
import os
import secrets
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "../presets"), os.path.join(HERE, "../../cpp_examples")]
import gpu  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402
import reshard  # noqa: E402
from oracle_values import noise  # noqa: E402

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
TINY = {**QWEN, "hidden_size": 112, "num_hidden_layers": 4, "intermediate_size": 592, "vocab_size": 1000}
SOURCE = {"framework": "megatron", "ranks": "0-3", "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TARGET = {"framework": "vllm", "ranks": "4"}
ENGINE, WORLD, GPU = 4, 5, 0
ROUNDS = 7
CHUNK = 16 << 20  # elements that are written or compared at a time
SCRATCH = 1 << 30  # bytes of the blocks between which the memcpy goes
SPARE = 6 << 30  # bytes for five contexts and what the library needs
POISON = 0xA5A5
tiny = os.environ.get("RESHARD_BENCH") == "tiny"
MODEL = TINY if tiny else QWEN
SPEC = {"model": MODEL, "source": SOURCE, "target": TARGET}


class Weights:
    """What each parameter of one rank holds at some version, in pieces.

    From the oracle of a model that is one element wide, which no cut depends on: it tells the row, or column, that each row or column of a
    parameter is. That one's number and the place along the hidden size make the element's 16 bits.
    """

    def __init__(self, rank):
        self.role = "target" if rank == ENGINE else "source"
        narrow = {**MODEL, "hidden_size": 1, "head_dim": MODEL["hidden_size"] // MODEL["num_attention_heads"]}
        spec = {**SPEC, "model": narrow}
        model = oracle.model_of(spec)
        self.params = {param.name: param for param in oracle.params(spec, self.role, rank, model)}
        self._lines = noise("lines", model.elements).astype(np.uint16)
        self._along = noise("along", MODEL["hidden_size"]).astype(np.uint16)

    def pieces(self, name, shape, version):
        """The first element of each piece, and the piece."""
        param = self.params[name]
        wide = [axis for axis, extent in enumerate(shape) if extent != param.shape[axis]]
        lines, along = self._lines[param.elements] ^ np.uint16(version), np.zeros(1, np.uint16)
        if wide:  # a bias has no hidden size
            along = self._along.reshape([-1 if axis == wide[0] else 1 for axis in range(len(shape))])
        row = int(np.prod(shape[1:]))
        step = max(1, CHUNK // row)
        for first in range(0, shape[0], step):
            a, b, pads = (x[first : first + step] if x.shape[0] == shape[0] else x for x in (lines, along, param.pads))
            piece = a ^ b
            if pads.any():
                piece[np.broadcast_to(pads, piece.shape)] = POISON
            yield first * row, piece


def without_memory(shape):
    """An array of 16-bit elements that only shows its shape."""
    strides = [2 * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), shape, strides)


class Rank:
    """One rank: a process that does what lines on its stdin say, and answers each by a line of JSON."""

    def __init__(self, name, rank):
        self.stream, self.weights = gpu.Stream(GPU), Weights(rank)
        self.preset = reshard.Preset(SPEC, rank)
        self.blocks, self.shapes, self.scratch = {}, {}, []
        role = reshard.TARGET if rank == ENGINE else reshard.SOURCE
        for param in self.preset.describe(reshard.DESCRIBE_LAYOUT)["params"]:
            name_of, shape = param["name"], tuple(param["shape"])
            block = gpu.Block(GPU, 2 * int(np.prod(shape)))
            self.blocks[name_of], self.shapes[name_of] = block, shape
            self.preset.bind(name_of, without_memory(shape), role, at=(block.at, block.kind, GPU))
        if self.shapes.keys() != self.weights.params.keys():
            raise AssertionError(f"other parameters: {sorted(self.shapes.keys() ^ self.weights.params.keys())}")
        self.bytes = sum(block.size for block in self.blocks.values())
        if rank == ENGINE:
            self.scratch = [gpu.Block(GPU, min(SCRATCH, self.bytes)) for _ in range(2)]
        self.comm = reshard.LocalComm(name, rank, WORLD)
        self.container = reshard.Container(self.preset, self.comm, f"rank {rank}")

    def connect(self):
        self.container.connect()
        return self.bytes

    def write(self, version):
        """Puts a trainer's weights of that version on the stream; 0: poison."""
        for name, block in self.blocks.items():
            for first, piece in self.weights.pieces(name, self.shapes[name], version):
                block.write(piece if version else np.full_like(piece, POISON), self.stream, 2 * first)

    def sync(self, version):
        """Its seconds, and launches where the driver counts them."""
        before, began = launches(), time.perf_counter()
        self.container.move(version, stream=self.stream.handle)
        return time.perf_counter() - began, launches() - before

    def check(self, version):
        for name, block in self.blocks.items():
            for first, piece in self.weights.pieces(name, self.shapes[name], version):
                got = np.empty_like(piece)
                block.read(got, self.stream, 2 * first)
                wrong = np.flatnonzero(got != piece)
                if wrong.size:
                    raise AssertionError(f"version {version}, {name}: {wrong.size} elements differ, the first is number {first + wrong[0]}")

    def memcpy(self):
        """Seconds for as many bytes as this rank has."""
        source, target = (c.c_uint64(block.at) for block in self.scratch)
        self.stream.wait()
        began, left = time.perf_counter(), self.bytes
        with gpu.on(GPU):
            while left:
                size = min(left, self.scratch[0].size)
                gpu.call("cuMemcpyDtoDAsync_v2", target, source, c.c_size_t(size), self.stream.handle)
                left -= size
        self.stream.wait()
        return time.perf_counter() - began

    def close(self):
        for handle in (self.container, self.comm, self.preset):
            handle.close()

    def free(self):
        """Once all ranks have closed: nobody has this memory open any more."""
        for block in [*self.blocks.values(), *self.scratch]:
            block.free()
        self.stream.close()


def launches():
    """Kernels so far, where the driver is the stand-in."""
    try:
        count = gpu.driver().standin_launches
    except AttributeError:
        return 0
    count.restype = c.c_uint64
    return count()


def rank_main(name, rank):
    mine = Rank(name, rank)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(json.dumps(getattr(mine, what)(*map(int, numbers))), flush=True)


class Job:
    """All ranks' processes."""

    def __init__(self):
        name = f"colocated-{secrets.token_hex(8)}"
        command = [sys.executable, os.path.abspath(__file__), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(WORLD)]

    def ask(self, *words, ranks=range(WORLD)):
        """The answers of these ranks, which work at the same time."""
        for rank in ranks:
            self.processes[rank].stdin.write(" ".join(map(str, words)) + "\n")
            self.processes[rank].stdin.flush()
        answers = [self.processes[rank].stdout.readline() for rank in ranks]
        for rank, answer in zip(ranks, answers):
            if not answer:
                raise AssertionError(f"rank {rank} has ended instead of an answer to '{words[0]}'")
        return [json.loads(answer) for answer in answers]

    def end(self):
        self.ask("close")
        self.ask("free")
        for process in self.processes:
            process.stdin.close()
        if any([process.wait() for process in self.processes]):
            raise AssertionError("a rank has not ended well")

    def kill(self):
        for process in self.processes:
            process.kill()


def run(job):
    total = job.ask("connect")[ENGINE]
    trainers, engine = range(ENGINE), [ENGINE]
    syncs, copies = [], []

    def checked(version):
        job.ask("write", 0, ranks=engine)
        job.ask("write", version, ranks=trainers)
        job.ask("sync", version)
        job.ask("check", version, ranks=engine)

    checked(1)
    job.ask("memcpy", ranks=engine)
    for version in range(2, ROUNDS + 2):
        syncs.append(job.ask("sync", version))
        copies += job.ask("memcpy", ranks=engine)
    checked(ROUNDS + 2)
    job.end()
    times = [max(seconds for seconds, _ in ranks) for ranks in syncs]
    sync, copy = statistics.median(times), statistics.median(copies)
    ratio = statistics.median(c / s for s, c in zip(times, copies))
    started = sum(count for _, count in syncs[-1])
    print(f"colocated, {'a tiny model, whose times mean nothing' if tiny else 'Qwen2.5-7B'}: Megatron TP 2 PP 2 -> vLLM TP 1, 5 processes on one GPU")
    print(f"colocated, bytes: {total:,} are right, at versions 1 and {ROUNDS + 2}")
    print(f"colocated, sync: {1000 * sync:.2f} ms, {total / sync / 1e9:.1f} GB/s; median of {ROUNDS}")
    print(f"colocated, memcpy on the device: {1000 * copy:.2f} ms, {total / copy / 1e9:.1f} GB/s; the sync is {ratio:.2f} as fast")
    print(f"colocated, launches of all ranks in a sync: {started or 'not known'}")


def main():
    weights = 2 * oracle_elements()
    free, total, wanted = c.c_size_t(), c.c_size_t(), 2 * weights + 2 * min(SCRATCH, weights) + SPARE
    with gpu.on(GPU):
        gpu.call("cuMemGetInfo_v2", c.byref(free), c.byref(total))
    if free.value < wanted:
        print(f"colocated, skipped: wants {wanted / 1e9:.1f} GB of memory on the GPU, of which {free.value / 1e9:.1f} GB are free")
        return
    job = Job()
    try:
        run(job)
    finally:
        job.kill()


def oracle_elements():
    """Parameters of the model."""
    return sum(int(np.prod(shape)) for shape in oracle.model_of(SPEC).shapes.values())


if __name__ == "__main__":
    if len(sys.argv) == 3:
        rank_main(sys.argv[1], int(sys.argv[2]))
    else:
        main()
