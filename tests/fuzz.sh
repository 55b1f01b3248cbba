#!/usr/bin/env bash
# Bytes that nobody would send on purpose, or only with one: tests/fuzz.sh [SECONDS [TARGET ...]] gives each target so long (60). A crash, a
# hang of ten seconds, or memory beyond a small multiple of the input ends it, and the input is kept in fuzz/artifacts. What was found once
# is in fuzz/regressions. RESHARD_AT_ONCE: how many targets run beside each other (3). Needs cargo and a C++ compiler; cargo-fuzz may be
# used too, but is not needed.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${1:-60} at_once=${RESHARD_AT_ONCE:-3}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(import pipeline spec structs wire)
host=$(rustc -vV | sed -n 's/^host: //p')
work=../target/fuzz
# What cargo-fuzz gives, by a stable compiler.
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$work
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address"
RUSTFLAGS=${RUSTFLAGS//$'\n'/ }
cargo build --locked --release --target "$host" $(printf -- '--bin %s ' "${targets[@]}")

one() {
    local target=$1 program=$work/$host/release/$1 corpus=$work/corpus/$1 artifacts=artifacts/$1/
    mkdir -p "$corpus" "$artifacts" "regressions/$target"
    local common=(-timeout=10 -rss_limit_mb=2500 -max_len=4096 -artifact_prefix="$artifacts" -verbosity=0)
    if ! { "$program" "${common[@]}" -runs=0 "regressions/$target" &&
        "$program" "${common[@]}" -max_total_time="$seconds" -print_final_stats=1 "$corpus" "seeds/$target"; } >"$work/$target.log" 2>&1; then
        tail -n 60 "$work/$target.log"
        echo "$target: failed"
        return 1
    fi
    printf '%-10s %s runs\n' "$target" "$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$target.log")"
}
failed=0
while [ ${#targets[@]} -gt 0 ]; do
    running=()
    for target in "${targets[@]:0:at_once}"; do
        one "$target" &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process" || failed=1; done
    targets=("${targets[@]:at_once}")
done
exit $failed
