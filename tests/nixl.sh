#!/usr/bin/env bash
# The library over NVIDIA's NIXL, on host memory: random layouts, and processes that are killed and stopped. Needs cargo, python3 with venv,
# x86-64. Downloads 0.1 GB from PyPI into target/nixl.
#
# RESHARD_CASES: random layouts (60). RESHARD_KILLS: rounds of killed or stopped processes (6).
# --library: only prints where the wheel's libnixl_capi.so is.
set -euo pipefail
cd "$(dirname "$0")/.."

work=target/nixl
if [[ ! -e $work/done ]]; then
    python3 -m venv "$work/venv" >&2
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$work/wheel" nixl-cu12==1.5.1 >&2
    touch "$work/done"
fi
library=$PWD/$work/wheel/.nixl_cu12.mesonpy.libs/libnixl_capi.so
if [[ ${1-} == --library ]]; then
    echo "$library"
    exit
fi

# UCX's module for InfiniBand, as this wheel has it, crashes at a process's end where there is no such card.
export RESHARD_NIXL=$library UCX_MODULES=^ib NIXL_LOG_LEVEL=FATAL
RESHARD_CASES=${RESHARD_CASES:-60} RESHARD_KILLS=${RESHARD_KILLS:-6} cargo test --quiet --locked --release --test properties --test kills
