#!/usr/bin/env bash
# Several hosts, as network namespaces of this machine with a link each: the SmolLM2 job with its trainer on two hosts and its engine on
# two others, links that are slow, a link that is lost. Counters of the links say what crossed them.
#
# Wants what cpp_examples/run.sh wants, and iproute2, which comes from apt-get; x86-64. Makes and removes the namespaces as root, or by
# sudo. Downloads 0.1 GB from PyPI into target/nixl.
set -euo pipefail
cd "$(dirname "$0")/.."

sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)
if ! command -v ip >/dev/null || ! command -v tc >/dev/null; then
    "${sudo[@]}" apt-get -qq update
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends iproute2
fi
# Builds everything, and runs the job on one host first.
cpp_examples/run.sh --tokens 24
library=$(tests/nixl.sh --library)
"${sudo[@]}" env RESHARD_LIBRARY="$PWD/build/prefix/lib/libreshard.so" PYTHONDONTWRITEBYTECODE=1 \
    build/venv/bin/python tests/hosts/main.py "$library" build/model build/engine
