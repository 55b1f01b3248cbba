"""libreshard for PyTorch: tensors become rows of the tables, and parameters become tensors again; neither copies a weight.

Not a part of the library: a file to copy and cut down, with reshard.py, whose classes it extends. The library borrows the tensors' memory,
and what is made here keeps the tensors alive. `p.data = ...` and `module.to(...)` give a parameter other memory, of which the library
hears nothing: tables are made after them. A sync writes into its targets behind autograd's back, so not between forward and backward.
"""

import ctypes as c

import reshard
import torch
from reshard import CPU, Dtype, Extents

CUDA, CUDA_HOST = 2, 3  # device types, beside CPU
DTYPES = {
    torch.bfloat16: (4, 16), torch.float16: (2, 16), torch.float32: (2, 32), torch.float64: (2, 64), torch.bool: (6, 8),
    torch.int8: (0, 8), torch.int16: (0, 16), torch.int32: (0, 32), torch.int64: (0, 64), torch.uint8: (1, 8),
}  # fmt: skip


def dtype(tensor):
    """Left out is what a weight is not by itself: complex numbers, and float8 and the like, which mean nothing without their scales."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{tensor.dtype} is none of {', '.join(str(known) for known in DTYPES)}")
    return Dtype(*DTYPES[tensor.dtype], 1)


def device(tensor):
    """DLPack's device type and id."""
    if tensor.device.type == "cuda":
        return CUDA, tensor.device.index
    if tensor.device.type != "cpu":
        raise TypeError(f"memory of the device '{tensor.device}' is neither a CPU's nor CUDA's")
    return (CUDA_HOST, torch.cuda.current_device()) if tensor.is_pinned() else (CPU, 0)


def row(name, tensor):
    """What a table says of a tensor's memory. The strides are its own: one with gaps or transposed is moved as it lies."""
    try:
        if tensor.layout != torch.strided:
            raise TypeError(f"its layout is {tensor.layout}, not torch.strided")
        kind, (device_type, device_id) = dtype(tensor), device(tensor)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    span = 1 + sum(max(extent - 1, 0) * stride for extent, stride in zip(tensor.shape, tensor.stride()))
    return {
        "name": name.encode(), "data": tensor.data_ptr(), "size_bytes": span * tensor.element_size(),
        "device_type": device_type, "device_id": device_id, "dtype": kind,
        "ndim": tensor.dim(), "shape": Extents(*tensor.shape), "strides": Extents(*tensor.stride()),
    }  # fmt: skip


class Layout(reshard.Layout):
    """One rank's tables."""

    def buffer(self, name, tensor, role, flags=0):
        """The row of a parameter."""
        self.buffers.append(reshard.BufferRow(role=role, flags=flags, **row(name, tensor)))
        self._arrays.append(tensor)
        return len(self.buffers) - 1

    def part(self, tensor, view, origin, buffer, piece):
        """The box that begins at `origin` of a Hugging Face tensor, the latter seen in the shape `view`, lies in a parameter where `piece`
        does: a view of that parameter, which has the box's shape."""
        whole = self._arrays[buffer]
        offset = piece.data_ptr() - whole.data_ptr()
        if piece.dtype != whole.dtype or not 0 <= offset < self.buffers[buffer].size_bytes:
            raise ValueError(f"{self.buffers[buffer].name.decode()}: the piece is no view of it")
        self.tile(tensor, buffer, offset, view, origin, piece.shape, piece.stride())

    def whole(self, tensor_name, name, tensor, role):
        """A parameter that is a Hugging Face tensor, no more and no less."""
        shape = tuple(tensor.shape)
        self.part(self.tensor(tensor_name, shape), shape, (0,) * len(shape), self.buffer(name, tensor, role), tensor)


class Preset(reshard.Preset):
    """One rank's part of a world spec: `for name, p in module.named_parameters(): preset.bind(name, p, TARGET)`."""

    def bind(self, name, tensor, role, chunk=0):
        bind = reshard._sized(reshard.BindStruct, role=role, model_chunk=chunk, **row(name, tensor))
        reshard._check(reshard._lib.rs_preset_bind(self._handle, c.byref(bind)))
        self._arrays[name, role, chunk] = tensor


class Loopback(reshard.LocalComm):
    """Threads of this process that give the same number. Between processes: reshard.LocalComm(name, rank, world)."""

    def __init__(self, hub, rank, world):
        self._handle = c.c_void_p()
        reshard._check(reshard._lib.rs_comm_loopback(c.c_uint64(hub), rank, world, c.byref(self._handle)))


class DLTensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p), ("device_type", c.c_int32), ("device_id", c.c_int32), ("ndim", c.c_int32), ("dtype", Dtype),
        ("shape", c.POINTER(c.c_int64)), ("strides", c.POINTER(c.c_int64)), ("byte_offset", c.c_uint64),
    ]  # fmt: skip


Deleter = c.CFUNCTYPE(None, c.c_void_p)


class DLManagedTensor(c.Structure):
    _fields_ = [("tensor", DLTensor), ("manager_ctx", c.c_void_p), ("deleter", Deleter)]


_lent = {}  # by the address of a DLManagedTensor that torch holds: what must live until torch gives it back


@Deleter
def _give_back(address, lent=_lent):
    del lent[address]


c.pythonapi.Py_IncRef(c.py_object(_give_back))  # never to be freed: at the interpreter's end a tensor may outlive this module
_new_capsule = c.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = c.py_object, [c.c_void_p, c.c_char_p, c.c_void_p]
_DLTENSOR = b"dltensor"  # a capsule keeps no copy of its name


def lend(param, owner):
    """A tensor in a parameter's memory (rs_param_t); the memory's owner lives as long as it does."""
    shape, strides = Extents(*param.shape[: param.ndim]), Extents(*param.strides[: param.ndim])
    kind = CPU if param.device_type == CUDA_HOST else param.device_type
    managed = DLManagedTensor(DLTensor(param.data, kind, param.device_id, param.ndim, param.dtype, shape, strides), None, _give_back)
    address = c.addressof(managed)
    _lent[address] = managed, owner  # and what `managed` points to, which ctypes keeps
    try:
        return torch.from_dlpack(_new_capsule(address, _DLTENSOR, None))
    except BaseException:
        _lent.pop(address, None)
        raise


class Container(reshard.Container):
    """This rank's tensors, a Layout or a Preset, and its part in every sync."""

    def __init__(self, layout, comm, name, timeout_ms=0):
        super().__init__(layout, comm, name, timeout_ms)
        tensors = layout._arrays.values() if isinstance(layout, Preset) else layout._arrays
        self._owners = {tensor.data_ptr(): tensor for tensor in tensors}
        self._gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)

    def sync(self, version, only=()):
        """Moves version `version`, or only those tensors of it. On a GPU it comes after what was enqueued on torch's current stream, and
        before what follows there. Returns when all ranks have landed."""
        stream = torch.cuda.current_stream(self._gpu).cuda_stream if self._gpu else None
        self.move(version, only=only, stream=stream)

    def tensor(self, name):
        """The parameter of that name as rs_get_param() tells of it: the same memory, also after this container's end."""
        param = self.param(name)
        return lend(param, self._owners[param.data])
