#!/usr/bin/env bash
# The library on real GPUs, checked and measured in one go. Where there is none: one line, and exit 0.
#
#   tests/gpu/run.sh [WORD ...]    all steps, or those whose name holds one of the words
#
# Needs a driver of CUDA 12 or later, a GPU of compute capability 8.0 or later with 8 GB, cargo and python3; builds nothing but the
# library and its tests. compute-sanitizer (of the CUDA toolkit, in PATH or /usr/local/cuda/bin), a python3 with PyTorch for CUDA and one with
# numpy (python3 or target/venv) are used where they are; the colocated sync wants 40 GB on one GPU. CUDA_VISIBLE_DEVICES chooses GPUs; of
# GPUs that do not all reach each other's memory, the first is taken.
#
# RESHARD_CASES: how many random layouts the property tests try (500). RESHARD_BENCH=tiny: only compares the benchmarks' bytes.
# RESHARD_LOGS: where the logs go (target/test-logs).
# shellcheck disable=SC2329 # steps call functions by name
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

# One line and exit 3: nothing to do.
code=0
probe=$(python3 tests/gpu/probe.py) || code=$?
echo "$probe"
case $code in
    0) ;;
    3) exit 0 ;;
    *) exit 1 ;;
esac

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || commit="$commit with changes"
export RESHARD_LOGS=${RESHARD_LOGS:-target/test-logs}/gpu RESHARD_MEMORY=cuda RESHARD_CASES=${RESHARD_CASES:-500}
if [[ $probe == *"peers: not all"* ]]; then
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
    echo "only the first GPU is used"
fi
# The driver translates the kernel once, not for each test.
export CUDA_CACHE_PATH=$PWD/target/cuda-cache
# A tool of the CUDA toolkit's own folder is found too.
PATH=$PATH:/usr/local/cuda/bin
# shellcheck source=tests/steps.sh
source tests/steps.sh "$@"

build() {
    cargo build --locked --release --lib
    cargo test --locked --release --no-run --test properties --test cuda --test streams --test offload --test kills
    cargo bench --locked --no-run --bench gpu
}

# sanitized TOOL FLAG ...: some random layouts and the benchmark's lists, with each access of the kernel checked. That calls of the driver
# fail is a matter of the tests: some ask what may not be there.
sanitized() {
    local tool=$1 host
    host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${host}_RUNNER=compute-sanitizer --tool $* --error-exitcode 1 --launch-timeout 120" RESHARD_BENCH=tiny
    RESHARD_CASES=60 some_tests cargo test --locked --release --test properties a_sync_writes
    cargo bench --locked --bench gpu
    [[ $(grep -c 'ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards' "$RESHARD_LOGS/run/$tool.log") == 2 ]] || {
        echo "$tool has not said twice that there is nothing"
        return 1
    }
}

torch_sync() {
    RESHARD_LIBRARY=$PWD/target/release/libreshard.so python3 -B cpp_examples/torch_sync.py --device cuda
}

colocated() { RESHARD_LIBRARY=$PWD/target/release/libreshard.so "$1" -B tests/gpu/colocated.py; }

left_out=()
step build      1200 build
step properties 1800 some_tests cargo test --locked --release --test properties
step cuda       1200 some_tests cargo test --locked --release --test cuda
step streams    1200 some_tests cargo test --locked --release --test streams
step offload    1200 some_tests cargo test --locked --release --test offload
step kills      1200 some_tests cargo test --locked --release --test kills
if command -v compute-sanitizer >/dev/null; then
    step memcheck  1800 sanitized memcheck --report-api-errors no
    step racecheck 1800 sanitized racecheck --racecheck-report all
else
    left_out+=("memcheck and racecheck: there is no compute-sanitizer")
fi
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    step torch 600 torch_sync
else
    left_out+=("torch: python3 has no PyTorch that finds a GPU")
fi
step bench      1200 cargo bench --locked --quiet --bench gpu
numpy=$(for python in python3 target/venv/bin/python; do "$python" -c 'import numpy' 2>/dev/null && echo "$python" && break; done)
if [ -n "$numpy" ]; then
    step colocated 900 colocated "$numpy"
else
    left_out+=("colocated: neither python3 nor target/venv has numpy")
fi

printf '\n%s\n' "For README.md"
printf 'Run of tests/gpu/run.sh on %s, commit %s:\n' "$(date '+%-d %B %Y')" "$commit"
echo "$probe"
echo "$passed steps passed, $failed failed; $RESHARD_CASES random layouts"
[ ${#left_out[@]} -eq 0 ] || printf 'left out: %s\n' "${left_out[@]}"
if is_chosen bench; then
    printf '\n'
    sed -n '/tiny sizes\|^|\|^bytes\|^goal/p' "$log_folder/bench.log"
fi
if is_chosen colocated && [ -n "$numpy" ]; then
    printf '\n'
    sed -n '/^colocated/p' "$log_folder/colocated.log"
fi
finish
