#!/usr/bin/env bash
# The kernel, as far as it can be checked without a GPU. Needs g++, python3-venv and pip's registry, no CUDA.
#
# - The PTX that is checked in is what the pinned compiler makes of the source.
# - ptxas puts all that each kind of GPU computes with into registers, and the copies of rows are 16 bytes wide, four at once.
# - The host build copies what a loop over single elements copies, and nothing else; no access to shared memory waits for another.
#
#   tests/kernels/run.sh [SEEDS]
set -euo pipefail
cd "$(dirname "$0")/../.."
seeds=${1:-400}
kernels=src/device/kernels
work=target/kernels
mkdir -p "$work"

fail() { echo "$*"; exit 1; }

echo "the PTX"
"$kernels/build.sh" "$work/copy.ptx"
cmp "$kernels/copy.ptx" "$work/copy.ptx" || fail "$kernels/copy.ptx is not what build.sh makes: run it and commit what it writes"

venv=target/kernels-venv
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps nvidia-cuda-nvcc-cu12==12.9.86 nvidia-cuda-nvdisasm==13.5.37
ptxas=$(echo "$venv"/lib/python3*/site-packages/nvidia/cuda_nvcc/bin/ptxas)
nvdisasm=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvdisasm)
for arch in sm_80 sm_90 sm_100; do
    "$ptxas" --verbose --gpu-name "$arch" "$kernels/copy.ptx" --output-file "$work/$arch.cubin" 2>"$work/$arch.txt"
    echo "$arch: $(grep -o 'Used [0-9]* registers' "$work/$arch.txt")"
    clean=" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    grep -q "$clean" "$work/$arch.txt" || fail "it spills: $(<"$work/$arch.txt")"
    "$nvdisasm" "$work/$arch.cubin" >"$work/$arch.sass" 2>"$work/$arch.txt" || fail "$(cat "$work/$arch.txt")"
    # The order of the 16-byte accesses: L a load, S a store, T a store to shared memory; . where the program may go elsewhere.
    letters='s/.* LDG\.E\.128 .*/L/p; s/.* STG\.E\.128 .*/S/p; s/.* STS\.128 .*/T/p; s/^\.L_x_.*|.* BRA .*/./p'
    order=$(sed -nE "$letters" "$work/$arch.sass" | tr -d '\n' | tr -s .)
    [[ $order == *LLLLSSSS* ]] || fail "rows: no four loads of 16 bytes before four such stores: $order"
    [[ $order == *LLLLTTT* ]] || fail "tiles: no four loads of 16 bytes under way: $order"
    # An address space that the compiler did not know: slower.
    ! grep -E ' (LD|ST)\.E' "$work/$arch.sass" || fail "accesses that are not known to be global"
done

echo "the host build"
g++ -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    tests/kernels/copy.cpp -o "$work/copy"
"$work/copy" "$seeds"
