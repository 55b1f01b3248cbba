#!/usr/bin/env bash
# The library on GPUs, over the stand-in driver: what `tests/cuda.rs` says, and the property tests with all weights in GPUs' and pinned
# memory, under several schedules, and processes that share GPUs and die. Needs cargo, g++.
#
# RESHARD_SEEDS: how many schedules (20). RESHARD_CASES: random layouts for each (60).
set -euo pipefail
cd "$(dirname "$0")/../.."

seeds=${RESHARD_SEEDS:-20}
export RESHARD_CASES=${RESHARD_CASES:-60} RESHARD_MEMORY=cuda

# over FOLDER TEST ...: these tests with the driver in that folder.
over() {
    local folder=$1 tests=()
    shift
    for test in "$@"; do tests+=(--test "$test"); done
    LD_LIBRARY_PATH=$folder cargo test --quiet --locked --release "${tests[@]}"
}

tests/standin/build.sh
for ((seed = 1; seed <= seeds; seed++)); do
    echo "schedule $seed"
    STANDIN_SEED=$seed over target/standin properties
done
echo "every call may fail"
over target/standin cuda nccl streams offload
echo "processes, killed and stopped"
over target/standin kills
echo "an old driver"
over target/standin-old properties cuda
echo "the benchmark's lists"
LD_LIBRARY_PATH=target/standin RESHARD_BENCH=tiny cargo bench --quiet --locked --bench gpu
