#!/usr/bin/env bash
# NCCL as NVIDIA ships it: cpp_examples/nccl.cpp compiles against its header and runs over the stand-in, and the real libnccl.so.2 is found,
# loaded and asked for an id where there is no GPU. Needs c++, python3 with venv, x86-64. Downloads 0.2 GB from PyPI into target/nccl.
#
# RESHARD_LIBRARY: the library; else one is built.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${RESHARD_LIBRARY-} ]]; then
    cargo build --locked --release --lib
    RESHARD_LIBRARY=target/release/libreshard.so
fi
work=target/nccl
wheels=$work/wheels/nvidia
if [[ ! -e $work/done ]]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --no-deps --target "$work/wheels" nvidia-nccl-cu12==2.20.5 \
        nvidia-cuda-runtime-cu12==12.4.127 nvidia-cuda-nvcc-cu12==12.4.131 nvidia-cuda-cccl-cu12==12.9.27
    touch "$work/done"
fi
mkdir -p "$work/lib"
cp "$RESHARD_LIBRARY" "$work/lib/libreshard.so.1"
ln -sf libreshard.so.1 "$work/lib/libreshard.so"
tests/standin/build.sh

echo "the example, over the stand-in"
includes=()
for part in nccl cuda_runtime cuda_nvcc cuda_cccl; do includes+=(-isystem "$wheels/$part/include"); done
c++ -std=c++17 -Wall -Wextra -Wpedantic -Werror cpp_examples/nccl.cpp -Iinclude "${includes[@]}" -o "$work/example" \
    -L"$work/lib" -lreshard -Ltarget/standin -lnccl -lcuda -pthread
for seed in 1 2 3 4 5; do
    STANDIN_SEED=$seed LD_LIBRARY_PATH=target/standin:$work/lib "$work/example"
done

echo "the real library, without a GPU"
LD_LIBRARY_PATH=$wheels/nccl/lib python3 - "$work/lib/libreshard.so.1" <<'PY'
import ctypes, sys

reshard = ctypes.CDLL(sys.argv[1])
reshard.rs_last_error.restype = ctypes.c_char_p
nccl, comm, version = ctypes.CDLL("libnccl.so.2"), ctypes.c_void_p(), ctypes.c_int()
unique = ctypes.create_string_buffer(128)
assert nccl.ncclGetVersion(ctypes.byref(version)) == 0 and version.value == 22005, version
assert nccl.ncclGetUniqueId(unique) == 0 and any(unique.raw)
status = reshard.rs_comm_nccl_init(unique, ctypes.c_size_t(128), 0, 1, ctypes.byref(comm))
text = reshard.rs_last_error().decode()
try:
    ctypes.CDLL("libcuda.so.1")
    print("there is a driver: the error is not looked at;", text)
except OSError:
    assert status == -3 and "no CUDA driver" in text and not comm.value, (status, text)
    print(f"NCCL {version.value}: {text}")
PY
