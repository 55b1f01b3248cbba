#!/usr/bin/env bash
# World specs, seen from Python: against what frameworks hold and against an oracle of numpy. tests/presets/run.sh [ARGUMENT ...], as main.py
# has them; makes target/venv, with numpy, where it is not there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=target/venv/bin/python
[ -x "$python" ] || python3 -m venv target/venv
"$python" -c 'import numpy' 2>/dev/null || target/venv/bin/pip install --quiet --disable-pip-version-check numpy
cargo build --locked --release --lib
RESHARD_LIBRARY=$PWD/target/release/libreshard.so exec "$python" tests/presets/main.py "$@"
