#!/usr/bin/env bash
# What takes longer than continuous integration may: about two hours on 2 cores. Like run.sh: tests/long.sh [WORD ...].
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/steps.sh
source tests/steps.sh "$@"

# All world specs whose weights move, in GPUs' memory over the stand-in driver.
gpu_worlds() {
    tests/standin/build.sh
    RESHARD_MEMORY=cuda RESHARD_GOLDENS=all LD_LIBRARY_PATH=target/standin tests/presets/run.sh --syncs
}

# Real Megatron-core into real vLLM: their own memory, their own checkpoint readers (tests/frameworks).
frameworks() {
    cargo build --locked --release --lib
    tests/frameworks/setup.sh
    RESHARD_LIBRARY=$PWD/target/release/libreshard.so target/frameworks/bin/python tests/frameworks/main.py
}

step needs     900 install_needs

step kills  1800 some_tests env RESHARD_KILLS=50 cargo test --locked --release --test kills
step random 3600 some_tests env RESHARD_CASES=100000 cargo test --locked --release --test properties
step worlds 1800 env RESHARD_WORLDS=5000 tests/presets/run.sh random_worlds
step sizes  1800 some_tests cargo test --locked --release --test real_sizes -- --ignored
step loom   3600 some_tests env RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom LOOM_MAX_PREEMPTIONS=4 \
    cargo test --locked --release --lib comm::local::ring
step gpu        2400 env RESHARD_SEEDS=60 RESHARD_CASES=300 tests/standin/run.sh
step gpu-worlds 1800 gpu_worlds
step mutations  7200 tests/standin/mutations.sh
step soak      1800 tests/faults/run.sh soak
step fuzz      7200 tests/fuzz.sh 1800
step hosts     1200 tests/hosts.sh
step nixl      1800 env RESHARD_CASES=1000 RESHARD_KILLS=50 tests/nixl.sh
step frameworks 3600 frameworks

finish
