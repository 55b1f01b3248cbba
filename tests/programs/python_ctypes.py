"""libreshard through ctypes alone: python_ctypes.py LIBRARY HEADER

Structs and constants are read from the header, so that a struct here and there cannot differ.
"""

import ctypes as c
import json
import re
import sys
import threading

lib = c.CDLL(sys.argv[1])
header = open(sys.argv[2]).read()
code = re.sub(r"/\*.*?\*/", "", header, flags=re.S)

CONSTANTS = {name: int(value) for name, value in re.findall(r"^#define (RS_\w+) (-?\d+)$", code, re.M)}
globals().update(CONSTANTS)
NUMBERS = {
    "uint8_t": c.c_uint8, "uint16_t": c.c_uint16, "uint32_t": c.c_uint32, "uint64_t": c.c_uint64, "int32_t": c.c_int32,
    "int64_t": c.c_int64, "size_t": c.c_size_t,
}  # fmt: skip
STRUCTS = {}


def field(text):
    """A member of a struct: its name and type. Pointers other than strings are plain addresses."""
    if match := re.fullmatch(r"rs_status_t \(\*(\w+)\).*|void \(\*(\w+)\).*", text):
        return match[1] or match[2], c.c_void_p
    kind, star, name, count = re.fullmatch(r"(?:const )?(\w+) ((?:\*|const )*)(\w+)(?:\[(\w+)\])?", text).groups()
    if star:
        return name, c.c_char_p if kind == "char" and star == "*" else c.c_void_p
    kind = NUMBERS.get(kind) or STRUCTS.get(kind) or c.c_void_p  # a name for a function pointer
    return name, kind * CONSTANTS[count] if count else kind


for struct, body in re.findall(r"^typedef struct (\w+) \{(.*?)^\}", code, re.M | re.S):
    fields = [field(" ".join(line.split())) for line in body.split(";") if line.strip()]
    STRUCTS[struct] = type(struct, (c.Structure,), {"_fields_": fields})
for text in ("rs_status_name", "rs_last_error"):
    getattr(lib, text).restype = c.c_char_p
for void in ("rs_container_destroy", "rs_comm_destroy", "rs_mem_free"):
    getattr(lib, void).restype = None


class Failed(Exception):
    pass


def check(status):
    if status != RS_OK:
        raise Failed(lib.rs_status_name(status).decode(), lib.rs_last_error().decode())


def fails(status, name, *words):
    text = lib.rs_last_error().decode()
    assert lib.rs_status_name(status).decode() == name, (status, text)
    assert all(word in text for word in words), text


def new(struct, **values):
    out = STRUCTS[struct](**values)
    if "struct_size" in dict(out._fields_):
        out.struct_size = c.sizeof(out)
    return out


def dims(*values):
    return (c.c_int64 * RS_MAX_RANK)(*values)


def tables(rank, memory):
    """A 3 x 4 tensor: rank 0 has it dense, rank 1 wants it transposed, each column 5 elements from the next."""
    shape, strides = ((3, 4), (4, 1)) if rank == 0 else ((4, 5), (5, 1))
    tensor = new("rs_tensor_t", name=b"model.w", rank=2, shape=dims(3, 4))
    buffer = new(
        "rs_buffer_t", name=b"trained" if rank == 0 else b"served", data=c.addressof(memory), size_bytes=c.sizeof(memory),
        device_type=RS_DEVICE_CPU, role=RS_SOURCE if rank == 0 else RS_TARGET, flags=0 if rank == 0 else RS_BUFFER_PADDED,
        dtype=STRUCTS["rs_dtype_t"](0, 32, 1), ndim=2, shape=dims(*shape), strides=dims(*strides),
    )  # fmt: skip
    stride = dims(4, 1) if rank == 0 else dims(1, 5)
    tile = new("rs_tile_t", rank=2, view=dims(3, 4), extent=dims(3, 4), stride=stride)
    rows = {"tensors": tensor, "buffers": buffer, "tiles": tile}
    layout = new("rs_layout_t")
    for table, row in rows.items():
        setattr(layout, table, c.addressof(row))
        setattr(layout, table[:-1] + "_count", 1)
        setattr(layout, table[:-1] + "_size", c.sizeof(row))
    layout.keep = rows  # ctypes keeps no reference by itself
    return layout


def describe(container, what):
    size = c.c_size_t()
    fails(lib.rs_container_describe(container, what, None, None, c.c_size_t(0), c.byref(size)), "RS_ERR_TOO_SMALL")
    text = c.create_string_buffer(size.value)
    check(lib.rs_container_describe(container, what, None, text, size, c.byref(size)))
    return json.loads(text.value)


def rank(me):
    memory = (c.c_int32 * 12)(*range(12)) if me == 0 else (c.c_int32 * 20)(*[-1] * 20)
    comm, container = c.c_void_p(), c.c_void_p()
    check(lib.rs_comm_loopback(c.c_uint64(5), me, 2, c.byref(comm)))
    config = new("rs_config_t", abi=RS_ABI, comm=comm.value, timeout_ms=20000, name=b"python")
    layout = tables(me, memory)
    check(lib.rs_container_create(c.byref(config), c.byref(layout), c.byref(container)))
    lib.rs_comm_destroy(comm)
    fails(lib.rs_sync_weights(container, c.byref(new("rs_sync_t", version=1))), "RS_ERR_STATE", "python: ", "rs_container_connect")
    check(lib.rs_container_connect(container))

    heard = []
    progress = c.CFUNCTYPE(None, c.c_void_p, c.c_uint64, c.c_uint64)(lambda user, done, total: heard.append((done, total)))
    sync = new("rs_sync_t", version=7, progress=c.cast(progress, c.c_void_p).value)
    check(lib.rs_sync_weights(container, c.byref(sync)))
    assert heard and heard[-1][0] == heard[-1][1], heard
    if me == 1:
        expected = [column + 4 * row if row < 3 else -1 for column in range(4) for row in range(5)]
        assert list(memory) == expected, list(memory)
        param = new("rs_param_t")
        check(lib.rs_get_param(container, b"served", c.byref(param)))
        assert (param.name, param.data, param.version, param.state) == (b"served", c.addressof(memory), 7, RS_PARAM_SYNCED)
        assert c.cast(param.shape, c.POINTER(c.c_int64))[: param.ndim] == [4, 5]
        fails(lib.rs_get_param(container, b"nobody", c.byref(param)), "RS_ERR_NOT_FOUND", "'nobody'")
    stats = describe(container, RS_DESCRIBE_STATS)
    assert (stats["state"], stats["version"]) == ("synced", 7), stats
    assert describe(container, RS_DESCRIBE_LAYOUT)["tensors"] == [{"name": "model.w", "shape": [3, 4]}]
    fails(lib.rs_sync_weights(container, c.byref(new("rs_sync_t", version=8 + me))), "RS_ERR_MISMATCH", "version 8", "version 9")
    lib.rs_container_destroy(container)


def both():
    failures = []

    def guarded(me):
        try:
            rank(me)
        except BaseException as error:  # an assertion of a thread is one of the test
            failures.append((me, error))

    threads = [threading.Thread(target=guarded, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for me, error in failures:
        raise AssertionError(f"rank {me}") from error


lines = []
log = c.CFUNCTYPE(None, c.c_void_p, c.c_uint32, c.c_char_p, c.c_char_p)(lambda user, *line: lines.append(line))
check(lib.rs_set_log(log, None, RS_LOG_INFO))
both()
check(lib.rs_set_log(None, None, RS_LOG_OFF))
assert [line for line in lines if line[0] == RS_LOG_INFO and line[1] == b"python" and b"connected over loopback" in line[2]], lines
assert [line for line in lines if line[0] == RS_LOG_ERROR and b"version 8" in line[2]], lines
both()  # the hub's number is free again
print("ok")
