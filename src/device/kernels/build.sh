#!/usr/bin/env bash
# Compiles the kernel: copy.ptx here, which is checked in, or FILE. Needs python3-venv and pip's registry, no CUDA.
#
#   src/device/kernels/build.sh [FILE]
#
# NVRTC 11.8, of which PTX 7.8 comes: every driver of CUDA 11.8 and later reads it. The same compiler writes the same bytes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
output=${1:-$here/copy.ptx}
venv=$here/../../../target/kernels-venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps nvidia-cuda-nvrtc-cu11==11.8.89
nvrtc=$(echo "$venv"/lib/python3*/site-packages/nvidia/cuda_nvrtc/lib)
LD_LIBRARY_PATH=$nvrtc "$venv/bin/python" "$here/build.py" libnvrtc.so.11.2 "$here/copy.cu" "$output"
