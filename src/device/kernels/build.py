"""Compiles a kernel with NVRTC: build.py LIBNVRTC SOURCE OUTPUT. build.sh calls it."""

import ctypes
import os
import sys

library, source, output = sys.argv[1:]
OPTIONS = ["--gpu-architecture=compute_80", "--std=c++17", "--include-path=" + os.path.dirname(os.path.abspath(source))]

nvrtc = ctypes.CDLL(library)
program = ctypes.c_void_p()


def text(what):
    """The program's PTX or its log."""
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, buffer) == 0
    return buffer.value


with open(source, "rb") as file:
    code = file.read()
assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"copy.cu", 0, None, None) == 0
options = (ctypes.c_char_p * len(OPTIONS))(*[option.encode() for option in OPTIONS])
status = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
sys.stderr.write(text("ProgramLog").decode())
if status:
    sys.exit(f"nvrtcCompileProgram: status {status}")
with open(output, "wb") as file:
    file.write(text("PTX"))
