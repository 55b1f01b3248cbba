"""libreshard from Python: the structs of reshard.h as ctypes, and small classes around its handles.

Not a part of the library: a file to copy and cut down. The library is $RESHARD_LIBRARY, else libreshard.so.1 where the loader finds it.
"""

import ctypes as c
import json
import os
import time

ABI = 1
MAX_RANK = 8
SOURCE, TARGET = 1, 2  # role
PADDED = 1  # buffer flag
CPU = 1  # device type
BF16 = (4, 16, 1)  # DLPack: code, bits, lanes
PARAM_SYNCED = 1
SYNC_VERIFY = 1  # sync flag
DESCRIBE_PLAN, DESCRIBE_STATS, DESCRIBE_LAYOUT, DESCRIBE_WORLD = 1, 2, 3, 4
IN_PROGRESS, ERR_TOO_SMALL = 1, -6

Extents = c.c_int64 * MAX_RANK


class Dtype(c.Structure):
    _fields_ = [("code", c.c_uint8), ("bits", c.c_uint8), ("lanes", c.c_uint16)]


class TensorRow(c.Structure):
    _fields_ = [("name", c.c_char_p), ("rank", c.c_uint32), ("reserved", c.c_uint32), ("shape", Extents)]


class BufferRow(c.Structure):
    _fields_ = [
        ("name", c.c_char_p), ("data", c.c_void_p), ("size_bytes", c.c_uint64),
        ("device_type", c.c_int32), ("device_id", c.c_int32), ("role", c.c_uint32), ("flags", c.c_uint32),
        ("dtype", Dtype), ("ndim", c.c_uint32), ("shape", Extents), ("strides", Extents),
    ]  # fmt: skip


class TileRow(c.Structure):
    _fields_ = [
        ("tensor", c.c_uint32), ("buffer", c.c_uint32), ("rank", c.c_uint32), ("transform", c.c_uint32), ("byte_offset", c.c_uint64),
        ("view", Extents), ("origin", Extents), ("extent", Extents), ("stride", Extents),
    ]  # fmt: skip


class LayoutStruct(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("tensors", c.POINTER(TensorRow)), ("tensor_count", c.c_size_t), ("tensor_size", c.c_size_t),
        ("buffers", c.POINTER(BufferRow)), ("buffer_count", c.c_size_t), ("buffer_size", c.c_size_t),
        ("tiles", c.POINTER(TileRow)), ("tile_count", c.c_size_t), ("tile_size", c.c_size_t),
    ]  # fmt: skip


class ConfigStruct(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t), ("abi", c.c_uint32), ("flags", c.c_uint32), ("comm", c.c_void_p), ("device", c.c_void_p),
        ("preset", c.c_void_p), ("host_id", c.c_uint64), ("staging_bytes", c.c_uint64), ("host_threads", c.c_uint32),
        ("timeout_ms", c.c_uint32), ("name", c.c_char_p),
    ]  # fmt: skip


class LocalStruct(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t), ("name", c.c_char_p), ("rank", c.c_int32), ("world", c.c_int32),
        ("timeout_ms", c.c_uint32), ("flags", c.c_uint32),
    ]  # fmt: skip


Progress = c.CFUNCTYPE(None, c.c_void_p, c.c_uint64, c.c_uint64)


class SyncStruct(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t), ("stream", c.c_void_p), ("version", c.c_uint64), ("only", c.POINTER(c.c_char_p)),
        ("only_count", c.c_size_t), ("timeout_ms", c.c_uint32), ("flags", c.c_uint32),
        ("progress", Progress), ("progress_user", c.c_void_p),
    ]  # fmt: skip


class ParamStruct(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t), ("name", c.c_char_p), ("data", c.c_void_p), ("size_bytes", c.c_uint64),
        ("device_type", c.c_int32), ("device_id", c.c_int32), ("dtype", Dtype), ("ndim", c.c_uint32),
        ("shape", c.POINTER(c.c_int64)), ("strides", c.POINTER(c.c_int64)), ("role", c.c_uint32), ("model_chunk", c.c_uint32),
        ("state", c.c_uint32), ("reserved", c.c_uint32), ("version", c.c_uint64),
    ]  # fmt: skip


class BindStruct(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t), ("name", c.c_char_p), ("role", c.c_uint32), ("model_chunk", c.c_uint32),
        ("data", c.c_void_p), ("size_bytes", c.c_uint64), ("device_type", c.c_int32), ("device_id", c.c_int32),
        ("dtype", Dtype), ("ndim", c.c_uint32), ("shape", c.POINTER(c.c_int64)), ("strides", c.POINTER(c.c_int64)),
    ]  # fmt: skip


_lib = c.CDLL(os.environ.get("RESHARD_LIBRARY", "libreshard.so.1"))
_lib.rs_status_name.restype = c.c_char_p
_lib.rs_last_error.restype = c.c_char_p
_lib.rs_comm_destroy.restype = _lib.rs_container_destroy.restype = _lib.rs_preset_destroy.restype = None
_lib.rs_container_describe.argtypes = [c.c_void_p, c.c_uint32, c.c_char_p, c.c_char_p, c.c_size_t, c.POINTER(c.c_size_t)]
_lib.rs_fingerprint.argtypes = [c.c_void_p, c.c_uint32, c.c_char_p, c.c_char_p]
_lib.rs_preset_describe.argtypes = [c.c_void_p, c.c_uint32, c.c_char_p, c.c_size_t, c.POINTER(c.c_size_t)]
_lib.rs_preset_create.argtypes = [c.c_char_p, c.c_int32, c.c_void_p]


class Error(Exception):
    def __init__(self, status):
        self.status = status
        super().__init__(f"{_lib.rs_status_name(status).decode()}: {_lib.rs_last_error().decode()}")


def _check(status):
    if status < 0:
        raise Error(status)


def _sized(kind, **fields):
    return kind(struct_size=c.sizeof(kind), **fields)


def _json(describe):
    """What one of the describe functions says; `describe` gives it a buffer."""
    text, length = c.create_string_buffer(4096), c.c_size_t()
    while (status := describe(text, len(text), c.byref(length))) == ERR_TOO_SMALL:
        text = c.create_string_buffer(length.value)
    _check(status)
    return json.loads(text.value)


class Layout:
    """The three tables of one rank; keeps the arrays whose memory they name."""

    def __init__(self):
        self.tensors, self.buffers, self.tiles = [], [], []
        self._tensor_rows, self._arrays = {}, []

    def tensor(self, name, shape):
        """The row of a Hugging Face tensor, made when it is first named."""
        if name not in self._tensor_rows:
            self._tensor_rows[name] = len(self.tensors)
            self.tensors.append(TensorRow(name.encode(), len(shape), 0, Extents(*shape)))
        return self._tensor_rows[name]

    def buffer(self, name, array, role, dtype=BF16, flags=0):
        """The row of a numpy array."""
        self._arrays.append(array)
        strides = [s // array.itemsize for s in array.strides]
        self.buffers.append(
            BufferRow(
                name.encode(), array.ctypes.data, array.nbytes, CPU, 0, role, flags,
                Dtype(*dtype), array.ndim, Extents(*array.shape), Extents(*strides),
            )  # fmt: skip
        )
        return len(self.buffers) - 1

    def tile(self, tensor, buffer, byte_offset, view, origin, extent, stride):
        """The box [origin, origin + extent) of a tensor seen through `view` lies in a buffer, with these strides in elements."""
        boxes = (Extents(*x) for x in (view, origin, extent, stride))
        self.tiles.append(TileRow(tensor, buffer, len(view), 0, byte_offset, *boxes))

    def extend(self, struct):
        """Adds another component's tables, a LayoutStruct; they must outlive this layout."""
        rows = [self.tensor(t.name.decode(), t.shape[: t.rank]) for t in struct.tensors[: struct.tensor_count]]
        first = len(self.buffers)
        self.buffers += struct.buffers[: struct.buffer_count]
        for t in struct.tiles[: struct.tile_count]:
            boxes = (t.view, t.origin, t.extent, t.stride)
            self.tiles.append(TileRow(rows[t.tensor], first + t.buffer, t.rank, t.transform, t.byte_offset, *boxes))

    def struct(self):
        def table(kind, rows):
            return (kind * len(rows))(*rows), len(rows), c.sizeof(kind)

        tables = *table(TensorRow, self.tensors), *table(BufferRow, self.buffers), *table(TileRow, self.tiles)
        return LayoutStruct(c.sizeof(LayoutStruct), *tables)


class Preset:
    """One rank's part of a world spec (a dict): what the tables of its parameters are, so that only memory is missing."""

    def __init__(self, spec, rank):
        self._arrays = {}
        self._handle = c.c_void_p()
        _check(_lib.rs_preset_create(json.dumps(spec).encode(), rank, c.byref(self._handle)))

    def bind(self, name, array, role, dtype=BF16, chunk=0, at=None):
        """A numpy array is the memory of a parameter; that of a later call replaces it. `at`: the address, device type and device of other
        memory, which is laid out as the array is."""
        data, device_type, device = at or (array.ctypes.data, CPU, 0)
        strides = [s // array.itemsize for s in array.strides]
        bind = _sized(
            BindStruct, name=name.encode(), role=role, model_chunk=chunk, data=data, size_bytes=array.nbytes,
            device_type=device_type, device_id=device, dtype=Dtype(*dtype), ndim=array.ndim, shape=Extents(*array.shape), strides=Extents(*strides),
        )  # fmt: skip
        _check(_lib.rs_preset_bind(self._handle, c.byref(bind)))
        self._arrays[name, role, chunk] = array

    def layout(self):
        """The tables, a LayoutStruct; it ends with the next bind or close."""
        out = _sized(LayoutStruct)
        _check(_lib.rs_preset_layout(self._handle, c.byref(out)))
        return out

    def describe(self, what):
        return _json(lambda *buffer: _lib.rs_preset_describe(self._handle, what, *buffer))

    def close(self):
        _lib.rs_preset_destroy(self._handle)
        self._handle = c.c_void_p()


class LocalComm:
    """The processes of this host that give the same name."""

    def __init__(self, name, rank, world, flags=0, timeout_ms=0):
        self._handle = c.c_void_p()
        local = _sized(LocalStruct, name=name.encode(), rank=rank, world=world, timeout_ms=timeout_ms, flags=flags)
        _check(_lib.rs_comm_local(c.byref(local), c.byref(self._handle)))

    def close(self):
        _lib.rs_comm_destroy(self._handle)
        self._handle = c.c_void_p()


class NixlComm:
    """Processes of any hosts; `config` is what rs_comm_nixl() says."""

    def __init__(self, config, rank, world):
        self._handle = c.c_void_p()
        _check(_lib.rs_comm_nixl(json.dumps(config).encode(), rank, world, c.byref(self._handle)))

    close = LocalComm.close


class CompositeComm:
    """The processes of this host through `near`, all others through `wide`."""

    def __init__(self, near, wide):
        self._handle = c.c_void_p()
        _check(_lib.rs_comm_composite(near._handle, wide._handle, c.byref(self._handle)))

    close = LocalComm.close


class Container:
    """This rank's weights, a Layout or a Preset, and its part in every sync."""

    def __init__(self, layout, comm, name, timeout_ms=0, flags=0):
        self._layout = layout  # the library borrows the weights' memory
        self._handle = c.c_void_p()
        preset = layout._handle if isinstance(layout, Preset) else None
        tables = None if preset else c.byref(layout.struct())
        config = _sized(
            ConfigStruct, abi=ABI, flags=flags, comm=comm._handle, preset=preset, timeout_ms=timeout_ms, name=name.encode()
        )  # fmt: skip
        _check(_lib.rs_container_create(c.byref(config), tables, c.byref(self._handle)))

    def connect(self):
        _check(_lib.rs_container_connect(self._handle))

    def set_comm(self, comm):
        """Another communicator, after the former failed; connect() comes next."""
        _check(_lib.rs_container_set_comm(self._handle, comm._handle))

    def sync(self, version, progress=lambda done, total: None, only=(), verify=False):
        """Takes part in moving version `version`, or only those tensors of it; what rs_container_describe() says about it. `verify`: what
        landed is compared with what was sent."""
        self.move(version, progress, only, verify=verify)
        return self.describe(DESCRIBE_STATS)

    def move(self, version, progress=lambda done, total: None, only=(), stream=None, verify=False):
        """The same with weights of a GPU on a stream of its; returns when all ranks have landed."""
        callback = Progress(lambda user, done, total: progress(done, total))
        names = (c.c_char_p * len(only))(*(name.encode() for name in only))
        flags = SYNC_VERIFY if verify else 0
        request = _sized(SyncStruct, stream=stream, version=version, progress=callback, only=names, only_count=len(only), flags=flags)
        status = _lib.rs_sync_weights(self._handle, c.byref(request))
        while status == IN_PROGRESS:
            time.sleep(0.0001)
            status = _lib.rs_container_poll(self._handle)
        _check(status)

    def param(self, name):
        out = _sized(ParamStruct)
        _check(_lib.rs_get_param(self._handle, name.encode(), c.byref(out)))
        return out

    def fingerprint(self, role, tensor=None):
        """A number of the weights that all ranks hold as SOURCE or TARGET, however they are cut. Collective."""
        out = c.create_string_buffer(16)
        _check(_lib.rs_fingerprint(self._handle, role, tensor and tensor.encode(), out))
        return int.from_bytes(out.raw, "little")

    def describe(self, what):
        return _json(lambda *buffer: _lib.rs_container_describe(self._handle, what, None, *buffer))

    def close(self):
        _lib.rs_container_destroy(self._handle)
        self._handle = c.c_void_p()
