#!/usr/bin/env bash
# What becomes of ranks whose machine has nothing left, and of those whose peers die again and again: tests/faults/run.sh runs main.py,
# tests/faults/run.sh soak [SYNCS [SEED]] runs soak.py. Makes target/venv, with numpy, where it is not there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=target/venv/bin/python
[ -x "$python" ] || python3 -m venv target/venv
"$python" -c 'import numpy' 2>/dev/null || target/venv/bin/pip install --quiet --disable-pip-version-check numpy
cargo build --locked --release --lib
export RESHARD_LIBRARY=$PWD/target/release/libreshard.so PYTHONDONTWRITEBYTECODE=1
if [[ ${1-} == soak ]]; then
    shift
    exec "$python" tests/faults/soak.py "$@"
fi
exec "$python" tests/faults/main.py "$@"
