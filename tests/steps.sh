#!/usr/bin/env bash
# Sourced by run.sh and long.sh, from the repository's root. A step is one line there:
#
#   step NAME SECONDS COMMAND [ARGUMENT ...]
#
# runs a command, or a function of the script, with its output in a log; says whether it passed; on failure prints the end of the log.
# SECONDS is its limit: a hang is a failure, not a wait. A command that exits with 77 was skipped: the last line of its log says why.
# `finish` prints the count and exits. Arguments of the script choose steps.

log_folder=${RESHARD_LOGS:-target/test-logs}/$(basename "$0" .sh)
chosen=("$@")
running=
passed=0
skipped=0
failed=0
export CARGO_TERM_COLOR=never

is_chosen() {
    [ ${#chosen[@]} -eq 0 ] && return
    local word
    for word in needs "${chosen[@]}"; do
        [[ $1 == *"$word"* ]] && return
    done
    return 1
}

step() {
    is_chosen "$1" || return 0
    local name=$1 limit=$2 log=$log_folder/$1.log begun=$SECONDS code=0 functions
    shift 2
    printf '%s  %-22s ' "$(date +%H:%M:%S)" "$name"
    functions=$(declare -f)
    timeout --kill-after=10 "$limit" bash -euo pipefail -c "$functions"$'\n''"$@"' "$name" "$@" >"$log" 2>&1 </dev/null &
    running=$!
    wait "$running" || code=$?
    if [ "$code" -eq 0 ]; then
        passed=$((passed + 1))
        printf 'ok      %4d s\n' $((SECONDS - begun))
        return
    fi
    if [ "$code" -eq 77 ]; then
        skipped=$((skipped + 1))
        printf 'SKIPPED %4d s: %s\n' $((SECONDS - begun)) "$(tail -n 1 "$log")"
        return
    fi
    failed=$((failed + 1))
    [ "$code" -eq 124 ] && code="not done after $limit s"
    printf 'FAILED  %4d s (exit: %s); the end of %s:\n' $((SECONDS - begun)) "$code" "$log"
    tail -n 40 "$log" | sed 's/^/    | /'
}

# An interrupted run leaves no step behind: `timeout` passes the signal on to all that it started.
trap 'echo interrupted; kill "$running"; exit 1' HUP INT TERM

finish() {
    printf '\n%d min %d s; logs in %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$log_folder"
    printf '%d passed, %d skipped, %d failed\n' "$passed" "$skipped" "$failed"
    [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
    exit
}

# apt_install PACKAGE ...
apt_install() {
    local sudo=()
    echo "installing with apt-get: $*"
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
}

# install_needs: what the steps need beyond git, Rust and python3, from apt, and only what is missing.
install_needs() {
    local missing=()
    need() { command -v "$1" >/dev/null || missing+=("$2"); }
    need cc gcc
    need c++ g++
    need make make
    need readelf binutils
    need cmake cmake
    need pkg-config pkg-config
    need python3 python3
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
    [ ${#missing[@]} -eq 0 ] || apt_install "${missing[@]}"
    for part in fmt clippy; do
        cargo "$part" --version || rustup component add "${part/fmt/rustfmt}"
    done
}

# some_tests COMMAND ...: a cargo test that must have run at least one test: a filter that fits nothing is a failure too.
some_tests() {
    local output ran code=0
    output=$(mktemp)
    "$@" | tee "$output" || code=$?
    ran=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$output")
    rm "$output"
    echo "$ran tests passed"
    [ "$code" -eq 0 ] && [ "$ran" -gt 0 ]
}

mkdir -p "$log_folder"
