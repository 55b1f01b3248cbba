"""Memory of GPUs and streams, by ctypes on the CUDA driver: blocks that the suite gives to the library in place of numpy's memory."""

import contextlib
import ctypes as c
import functools

CUDA, CUDA_HOST = 2, 3  # DLPack's device types
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


@functools.cache
def driver():
    library = c.CDLL("libcuda.so.1")
    if answer := library.cuInit(0):
        raise RuntimeError(f"cuInit answered {answer}")
    return library


def call(name, *arguments):
    """Addresses and sizes as ctypes' own: a plain number is an int of C."""
    if answer := getattr(driver(), name)(*arguments):
        raise RuntimeError(f"{name} answered {answer}")


@functools.cache
def count():
    number = c.c_int()
    call("cuDeviceGetCount", c.byref(number))
    return number.value


def retain(gpu):
    context = c.c_void_p()
    call("cuDevicePrimaryCtxRetain", c.byref(context), gpu)
    return context


def release(gpu):
    call("cuDevicePrimaryCtxRelease_v2", gpu)


@contextlib.contextmanager
def on(gpu):
    """The GPU's primary context is current on this thread."""
    call("cuCtxPushCurrent_v2", retain(gpu))
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", c.byref(c.c_void_p()))
        release(gpu)


class Stream:
    """One that waits for no other. Its GPU's context stays as long as it."""

    def __init__(self, gpu):
        self.gpu, self.handle = gpu, c.c_void_p()
        retain(gpu)
        with on(gpu):
            call("cuStreamCreate", c.byref(self.handle), NON_BLOCKING)

    def wait(self):
        with on(self.gpu):
            call("cuStreamSynchronize", self.handle)

    def close(self):
        with on(self.gpu):
            call("cuStreamSynchronize", self.handle)
            call("cuStreamDestroy_v2", self.handle)
        release(self.gpu)


class Block:
    """Memory of a GPU, whose context stays as long as it. What is in it at first is anything."""

    kind = CUDA

    def __init__(self, gpu, size):
        self.gpu, self.size = gpu, size
        retain(gpu)
        with on(gpu):
            self.at = self.take()

    def take(self):
        at = c.c_uint64()
        call("cuMemAlloc_v2", c.byref(at), c.c_size_t(self.size))
        return at.value

    def give_back(self):
        call("cuMemFree_v2", c.c_uint64(self.at))

    def free(self):
        with on(self.gpu):
            self.give_back()
        release(self.gpu)

    def write(self, array, stream, offset=0):
        """The bytes of a contiguous array, in the order of a stream of its GPU."""
        to, size = self.part(array, offset)
        with on(self.gpu):
            call("cuMemcpyHtoDAsync_v2", c.c_uint64(to), c.c_void_p(array.ctypes.data), c.c_size_t(size), stream.handle)

    def read(self, array, stream, offset=0):
        """Into a contiguous array; waits."""
        source, size = self.part(array, offset)
        with on(self.gpu):
            call("cuMemcpyDtoHAsync_v2", c.c_void_p(array.ctypes.data), c.c_uint64(source), c.c_size_t(size), stream.handle)
        stream.wait()

    def part(self, array, offset):
        if not array.flags.forc or offset + array.nbytes > self.size:
            raise ValueError(f"{array.nbytes} bytes at {offset} are not in one piece, or not in a block of {self.size}")
        return self.at + offset, array.nbytes


class Pinned(Block):
    """Memory of the host that a GPU reads and writes."""

    kind = CUDA_HOST

    def take(self):
        at = c.c_void_p()
        call("cuMemHostAlloc", c.byref(at), c.c_size_t(self.size), 0)
        return at.value

    def give_back(self):
        call("cuMemFreeHost", c.c_void_p(self.at))

    def write(self, array, stream, offset=0):
        to, size = self.part(array, offset)
        stream.wait()
        c.memmove(to, array.ctypes.data, size)

    def read(self, array, stream, offset=0):
        source, size = self.part(array, offset)
        stream.wait()
        c.memmove(array.ctypes.data, source, size)
