#!/usr/bin/env bash
# Builds the stand-in driver and the stand-in NCCL, with g++ alone:
#
#   target/standin/libcuda.so.1        all of it
#   target/standin/libnccl.so.2        works on either driver
#   target/standin-old/libcuda.so.1    without what older drivers lack: stream-ordered memory, words that streams wait
#                                      for, and the way from mapped memory to its handle
#
#   tests/standin/build.sh [FOLDER SYMBOL,SYMBOL ...]     another one, into FOLDER, without these functions
set -euo pipefail
cd "$(dirname "$0")/../.."

sources=(tests/standin/{state,races,contexts,memory,schedule,graphs,kernels,ptx}.cpp tests/standin/api_*.cpp)
kernel=src/device/kernels/copy.cu
objects=target/standin/objects
flags=(-std=c++17 -O2 -g -fPIC -fvisibility=hidden -Wall -Wextra -Wno-address)
built=()
mkdir -p "$objects"

# compile SOURCE FLAG ...: into an object, unless that is newer than everything it may depend on.
compile() {
    local object=$objects/$(basename "$1").o
    built+=("$object")
    [[ -z $(find tests/standin/*.h tests/standin/build.sh "$(dirname "$1")"/*.h "$1" -newer "$object" 2>&1) ]] && return
    g++ "${@:2}" "${flags[@]}" -c "$1" -o "$object.$$"
    mv "$object.$$" "$object"
}

# link FOLDER SYMBOL,SYMBOL: without these. Replaced in one step, as tests may be loading the file that is there.
link() {
    local folder=$1 missing=$2 file
    mkdir -p "$folder"
    file=$folder/libcuda.so.1
    printf '{ local: %s rs_at; reshard_copy_*; };\n' "${missing:+${missing//,/; };}" >"$folder/exports.map"
    g++ -shared "${built[@]}" -o "$file.$$" -ldl -pthread \
        -Wl,-soname,libcuda.so.1 -Wl,-z,nodelete -Wl,--version-script="$folder/exports.map"
    mv "$file.$$" "$file"
    ln -sf libcuda.so.1 "$folder/libcuda.so"
}

for source in "${sources[@]}"; do compile "$source"; done
if [[ -e $kernel ]]; then compile "$kernel" -x c++; fi

if [[ $# -gt 0 ]]; then
    link "$1" "${2-}"
    exit
fi
link target/standin ""
link target/standin-old cuMemAllocAsync,cuMemAllocFromPoolAsync,cuMemFreeAsync,cuMemRetainAllocationHandle,cuStreamWaitValue64_v2,cuStreamWriteValue64_v2

built=()
for source in tests/standin/nccl*.cpp; do compile "$source"; done
nccl=target/standin/libnccl.so.2
g++ -shared "${built[@]}" -o "$nccl.$$" target/standin/libcuda.so -Wl,-soname,libnccl.so.2 -Wl,-z,nodelete
mv "$nccl.$$" "$nccl"
ln -sf libnccl.so.2 target/standin/libnccl.so
ln -sf ../standin/libnccl.so.2 target/standin-old/libnccl.so.2
