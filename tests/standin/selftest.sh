#!/usr/bin/env bash
# The stand-in's own tests: each violation ends a program by its name, and nothing else does.
#
#   tests/standin/selftest.sh [WORD]     all cases, or those whose name holds the word
set -euo pipefail
cd "$(dirname "$0")/../.."

tests/standin/build.sh
program=target/standin/selftest
g++ -std=c++17 -O1 -g -Wall -Wextra -Itests/standin tests/standin/selftest*.cpp -o "$program" target/standin/lib{nccl,cuda}.so -pthread

# The old driver lacks what it is to lack, and nothing else.
exports() { nm -D --defined-only "$1" | awk '$2 == "T" { print $3 }'; }
lacks=$(comm -23 <(exports target/standin/libcuda.so.1) <(exports target/standin-old/libcuda.so.1) | xargs)
if [[ $lacks != "cuMemAllocAsync cuMemAllocFromPoolAsync cuMemFreeAsync cuMemRetainAllocationHandle cuStreamWaitValue64_v2 cuStreamWriteValue64_v2" ]]; then
    echo "the old driver lacks: $lacks"
    exit 1
fi

LD_LIBRARY_PATH=target/standin "$program" "$@"
