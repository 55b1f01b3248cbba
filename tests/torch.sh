#!/usr/bin/env bash
# PyTorch's tensors through the library, on a CPU: tests/torch.sh [WORD ...], the tests of tests/programs/torch_tensors.py that have one of
# the words in their names. RESHARD_LIBRARY is the library, else it is built.
#
# Runs in the first Python that has PyTorch, 1.13 or newer: python3, target/frameworks (tests/frameworks), target/torch. The last is made
# where there is none, of the wheel that tests/frameworks takes: 0.5 GB from PyPI, 1.3 GB unpacked, less than a minute. That wants x86-64,
# Python 3.10 or newer with venv, gcc and readelf, and no rights beyond the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

make_python() {
    local there=target/torch wanted
    wanted=$(grep -E '^(torch|typing_extensions)==' tests/frameworks/requirements.txt)
    cat tests/torch.sh tests/frameworks/stubs.py - <<<"$wanted" | cmp -s - $there/complete && return
    python3 -m venv --clear $there
    $there/bin/pip install --only-binary :all: --no-deps --progress-bar off -r /dev/stdin <<<"$wanted"
    $there/bin/python tests/frameworks/stubs.py "$($there/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    $there/bin/python -W ignore -c 'import torch'
    cat tests/torch.sh tests/frameworks/stubs.py - <<<"$wanted" >$there/complete
}

has_torch() { "$1" -W ignore -c 'from torch import from_dlpack' 2>/dev/null; }

python=python3
has_torch $python || python=target/frameworks/bin/python
has_torch $python || { make_python; python=target/torch/bin/python; }
if [ -z "${RESHARD_LIBRARY:-}" ]; then
    cargo build --locked --release --lib
    export RESHARD_LIBRARY=$PWD/target/release/libreshard.so
fi
exec $python tests/programs/torch_tensors.py "$@"
