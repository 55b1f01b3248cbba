#!/usr/bin/env bash
# What takes longer than continuous integration may: about four hours on 2 cores. Like run.sh: tests/long.sh [WORD ...].
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

# Two programs in C under valgrind, one of them with processes of its own; and one that writes too far, which valgrind must see.
valgrind_c() {
    local work=target/valgrind source report
    command -v valgrind >/dev/null || apt_install valgrind
    mkdir -p "$work"
    cargo build --locked --release --lib
    build() { cc -g -Iinclude "$1" -o "$work/program" "${@:2}" target/release/libreshard.a -lgcc_s -lutil -lrt -lpthread -lm -ldl; }
    checked() { valgrind --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,indirect --trace-children=yes "$work/program"; }
    for source in tests/install/app.c cpp_examples/own_pipes.c; do
        build "$source"
        checked
    done
    build tests/install/app.c -DOVERRUN=1
    if report=$(checked 2>&1); then
        echo "the overrun was not seen"
        return 1
    fi
    grep 'Invalid write' <<<"$report"
}

# What a stricter machine says of the code that other languages call and that calls theirs; the rest of the unsafe code is system calls.
miri() {
    if ! cargo +nightly miri --version; then
        echo "cargo +nightly miri does not run here"
        return 77
    fi
    # Addresses are numbers at the boundary of C.
    export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-permissive-provenance" CARGO_TARGET_DIR=target/miri
    some_tests cargo +nightly miri test --locked --lib -- ffi:: comm::foreign device::foreign comm::loopback host::tests::several_jobs
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
step valgrind   600 valgrind_c
step miri      1800 miri
step frameworks 3600 frameworks

finish
