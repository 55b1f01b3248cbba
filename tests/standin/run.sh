#!/usr/bin/env bash
# The library on GPUs, over the stand-in driver: what `tests/cuda.rs` says, and the property tests with all weights in GPUs' and pinned
# memory, under several schedules, processes that share GPUs and die, and world specs by Python. Needs cargo, g++, python3 with venv.
#
# RESHARD_SEEDS: how many schedules (20). RESHARD_CASES: random layouts for each (30). RESHARD_WORLDS: random world specs (100).
set -euo pipefail
cd "$(dirname "$0")/../.."

seeds=${RESHARD_SEEDS:-20}
export RESHARD_CASES=${RESHARD_CASES:-30} RESHARD_MEMORY=cuda

# over FOLDER TEST ...: these tests with the driver in that folder; without those named by $SKIP, if it is set.
over() {
    local folder=$1 tests=()
    shift
    for test in "$@"; do tests+=(--test "$test"); done
    LD_LIBRARY_PATH=$folder cargo test --quiet --locked --release "${tests[@]}" ${SKIP:+-- --skip "$SKIP"}
}

tests/standin/build.sh
for ((seed = 1; seed <= seeds; seed++)); do
    echo "schedule $seed"
    # Fingerprints are part of the random layouts too; their own tests take as long as these.
    SKIP=$([ $((seed % 5)) -eq 1 ] || echo sums) STANDIN_SEED=$seed over target/standin properties
done
echo "every call may fail"
# The streams' tests wait for deadlines most of the time.
over target/standin streams >target/standin/streams.log 2>&1 &
beside=$!
over target/standin cuda nccl offload
wait "$beside" || { cat target/standin/streams.log; exit 1; }
echo "processes, killed and stopped"
over target/standin kills
RESHARD_GPU_MEMORY=mapped over target/standin kills
echo "an old driver"
over target/standin-old properties cuda
echo "world specs"
# In threads the small suites; in processes the largest case of dense models, sides on ranks of their own, shared experts with a layer
# for multi-token prediction, 16 ranks at once, and casts. All others, and the golden files, are for tests/long.sh.
export RESHARD_WORLDS=${RESHARD_WORLDS:-100}
export RESHARD_MATRIX="TP 1 PP 2 to TP 2 PP 4,on other ranks,Glm4Moe,16 processes,casts"
LD_LIBRARY_PATH=target/standin tests/presets/run.sh vectors expert_vectors attention_vectors vision_vectors changes mindspeed gpt_oss variants \
    matrix random_worlds
echo "the benchmark's lists"
LD_LIBRARY_PATH=target/standin RESHARD_BENCH=tiny cargo bench --quiet --locked --bench gpu
echo "a colocated sync"
LD_LIBRARY_PATH=target/standin RESHARD_BENCH=tiny RESHARD_LIBRARY=$PWD/target/release/libreshard.so target/venv/bin/python tests/gpu/colocated.py
