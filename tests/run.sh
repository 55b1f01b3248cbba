#!/usr/bin/env bash
# All tests that continuous integration runs: at most 25 minutes on 2 cores. Installs what it needs (apt, as root or with sudo).
#
#   tests/run.sh [WORD ...]    all steps, or those whose name holds one of the words
#
# RESHARD_CASES: how many random layouts the property tests try. RESHARD_LOGS: where the logs go (target/test-logs).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=tests/steps.sh
source tests/steps.sh "$@"

# The order of the shared words, as any two threads may see them that are interrupted three times at most (long.sh: four times). Not
# optimised: the compiler would take longer than the test.
loom() {
    export RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom LOOM_MAX_PREEMPTIONS=3 CARGO_PROFILE_DEV_DEBUG=0
    some_tests cargo test --locked --lib comm::local::ring
}

host() { rustc -vV | sed -n 's/^host: //p'; }

# cargo COMMAND ... with the address sanitizer in every crate but the standard library; RUSTC_BOOTSTRAP lets a stable rustc do it.
# Lightly optimised, for time, with all of the debug build's checks.
sanitized() {
    export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/asan
    export CARGO_PROFILE_DEV_OPT_LEVEL=1 CARGO_PROFILE_DEV_DEBUG=line-tables-only
    cargo "$@" --locked --target "$(host)"
}

# holds SYMBOL FILE: whether the file names it.
holds() { grep -aq -- "$1" "$2"; }

# The Rust tests again, and the proof that they ran with the sanitizer: our code calls its checks, and the shipped library does not.
asan_rust() {
    export RESHARD_CASES=${RESHARD_CASES:-250}
    local built name targets=(--lib)
    # Plans of real sizes are safe code alone, and would take very long; some others call nothing of the library.
    for name in tests/*.rs tests/*/main.rs; do
        name=${name#tests/} name=${name%/main.rs} name=${name%.rs}
        [[ $name =~ ^(real_sizes|figures|header|layers)$ ]] || targets+=(--test "$name")
    done
    some_tests sanitized test "${targets[@]}" --no-fail-fast
    sanitized build --lib
    built=target/asan/$(host)/debug
    holds __asan_report "$built/libreshard.a" || { echo "libreshard.a is not sanitized"; return 1; }
    for program in "$built"/deps/*; do
        [[ -x $program && $program != *.so ]] || continue
        holds __asan_init "$program" || { echo "$program is not sanitized"; return 1; }
    done
    ! holds __asan_ target/release/libreshard.so || { echo "the release library is sanitized"; return 1; }
}

# asan_link OUTPUT SOURCE [FLAG ...]: a C or C++ program with the sanitized library and the runtime that fits it, which is Rust's.
asan_link() {
    local output=$1 source=$2 compiler=cc
    shift 2
    [[ $source == *.cpp ]] && compiler="c++ -std=c++17"
    $compiler -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -Iinclude -c "$source" -o "$output.o" "$@"
    ${compiler% *} "$output.o" "target/asan/$(host)/debug/libreshard.a" -Wl,--whole-archive \
        "$(rustc --print sysroot)/lib/rustlib/$(host)/lib/"librustc*_rt.asan.a -Wl,--no-whole-archive \
        -lubsan -lresolv -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc -o "$output"
    holds __asan_init "$output" || { echo "$output is not sanitized"; return 1; }
}

# C and C++ programs with address, leak and undefined-behaviour sanitizers in both them and the library.
asan_c() {
    local work=target/asan-c source report
    mkdir -p "$work"
    sanitized build --lib
    for source in cpp_examples/*.c cpp_examples/*.cpp tests/install/app.c tests/programs/handles.cpp; do
        [[ $source =~ /(nccl|own_comm)\.cpp$ ]] && continue # want NVIDIA's headers, and MPI's
        echo "$source"
        asan_link "$work/program" "$source"
        "$work/program"
    done
    # The sanitizer sees what the library does: a target shorter than its caller promised is a report, from within the library.
    asan_link "$work/overrun" tests/install/app.c -DOVERRUN=1
    if report=$("$work/overrun" 2>&1); then
        echo "the overrun was not seen"
        return 1
    fi
    echo "$report"
    grep -q 'AddressSanitizer: heap-buffer-overflow' <<<"$report"
    grep -q '#[0-9]* .* in reshard::' <<<"$report"
}

step needs           900 install_needs

step format          120 cargo fmt --check
step clippy          600 cargo clippy --locked --all-targets -- -D warnings
step documentation   300 env RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --lib
step rust           1200 some_tests env RESHARD_CASES="${RESHARD_CASES:-4000}" cargo test --locked --release --no-fail-fast
step loom            600 loom
step presets         600 env RESHARD_WORLDS="${RESHARD_WORLDS:-200}" tests/presets/run.sh
step torch           300 tests/torch.sh
step kernels         300 tests/kernels/run.sh
step standin         300 tests/standin/selftest.sh
step nccl            300 tests/nccl.sh
step nixl            600 tests/nixl.sh
step faults          300 tests/faults/run.sh
step fuzz            900 env RESHARD_AT_ONCE=5 tests/fuzz.sh 60
step mpi             300 tests/mpi.sh
step gpu             900 env RESHARD_SEEDS="${RESHARD_SEEDS:-5}" tests/standin/run.sh
step install         600 tests/install.sh
step asan-rust      1200 asan_rust
step asan-c          600 asan_c
step model           600 cpp_examples/run.sh
step model-replicas  600 cpp_examples/run.sh --replicas 3
step model-colocated 600 cpp_examples/run.sh --colocated
step model-tables-9  600 cpp_examples/run.sh --tables --engines 9
step model-tables-co 600 cpp_examples/run.sh --tables --colocated

finish
