#!/usr/bin/env bash
# A communicator of the caller's own over a real MPI: cpp_examples/own_comm.cpp on six processes of Open MPI, which it installs from apt (as
# root or with sudo) where there is no mpicxx. Every weight is looked at, a rank is lost twice, and a message that is spoilt on purpose must
# be found.
#
# RESHARD_LIBRARY: the library; else one is built.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v mpicxx >/dev/null || ! command -v mpirun >/dev/null; then
    sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends libopenmpi-dev openmpi-bin
fi
if [[ -z ${RESHARD_LIBRARY-} ]]; then
    cargo build --locked --release --lib
    RESHARD_LIBRARY=target/release/libreshard.so
fi
work=target/mpi
mkdir -p "$work/lib"
cp "$RESHARD_LIBRARY" "$work/lib/libreshard.so.1"
ln -sf libreshard.so.1 "$work/lib/libreshard.so"
export LD_LIBRARY_PATH=$PWD/$work/lib
# Root is fine; no ssh is wanted on one host; and containers often forbid the system call that reads another process.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_plm_rsh_agent=sh OMPI_MCA_btl_vader_single_copy_mechanism=none

# OMPI_SKIP_MPICXX: without MPI's former C++ functions, whose header warns.
build() {
    mpicxx -std=c++17 -O1 -Wall -Wextra -Wpedantic -Werror -DOMPI_SKIP_MPICXX "$1" -o "$2" -Iinclude -L"$work/lib" -lreshard -pthread
}
six() { timeout --kill-after=10 100 mpirun --oversubscribe --bind-to none -n 6 "$@"; }
# lines COUNT PATTERN: so many lines of the last run's output are like this.
lines() {
    local found
    found=$(grep -cE "$2" <<<"$output") || true
    [ "$found" -eq "$1" ] || { echo "$found lines like '$2', not $1"; return 1; }
}

build cpp_examples/own_comm.cpp "$work/own_comm"
output=$(six "$work/own_comm")
echo "$output"
lines 1 '^three versions are where they belong$'

echo "a rank is lost"
output=$(six "$work/own_comm" --lose-a-rank)
echo "$output"
lines 5 '^rank [0-4], after [0-9]+ ms: RS_ERR_TIMEOUT, waited [0-9]+ ms for rank 5$'
lines 6 '^rank [0-5], after [0-9]+ ms: RS_ERR_ABORTED, rank 0 gave up, waiting for'
lines 1 '^three versions are where they belong$'
lines 1 '^rank 5 was lost twice: all knew, and two more versions are where they belong$'

echo "pieces that are sent from a wrong place are found"
sed 's/memcpy(lane.piece.data(), front.data, bytes)/memcpy(lane.piece.data(), front.data + (bytes < front.left ? 4 : 0), bytes)/' \
    cpp_examples/own_comm.cpp >"$work/spoilt.cpp"
! cmp -s cpp_examples/own_comm.cpp "$work/spoilt.cpp" || { echo "nothing was spoilt"; exit 1; }
build "$work/spoilt.cpp" "$work/spoilt"
if output=$(six "$work/spoilt" 2>&1); then
    echo "$output"
    echo "they were not"
    exit 1
fi
grep -E 'rank [0-9]: [0-9]+ wrong elements' <<<"$output"
