#!/usr/bin/env bash
# gpu_slot.sh [OPTION...]: all that is worth measuring on a GPU, in at most nine minutes: python -m benchmarks.gpu_slot.
# It takes .venv where there is one. On a bare machine: python3 with torch for CUDA, and what gpu_wheels.sh collected.
#   WHEELS  their folder (default: .wheels)
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheels=${WHEELS:-.wheels}
python=.venv/bin/python
if [ -d "$wheels" ]; then
    python=python3
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
    install() {  # FOLDER OF WHEELS, FOLDER OF PACKAGES
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$2" "$1"/*.whl
    }
    install "$wheels" "$place/packages"
    if [ -d "$wheels/unsloth" ]; then
        cp "$wheels"/bitsandbytes-*.whl "$place"  # the rest it takes from the machine, not from the versions above
        install "$wheels/unsloth" "$place/unsloth"
        install "$place" "$place/unsloth"
        export LORA2SERVE_UNSLOTH=$place/unsloth
    fi
    export PYTHONPATH=$place/packages${PYTHONPATH:+:$PYTHONPATH}
fi
[ -x "$python" ] || command -v "$python" >/dev/null || { echo "gpu_slot: no .venv (make setup) and no $wheels (scripts/gpu_wheels.sh)" >&2; exit 1; }
"$python" -m benchmarks.gpu_slot "$@"
