#!/usr/bin/env bash
# gpu_wheels.sh [FOLDER]: what scripts/gpu_slot.sh needs on a GPU machine that reaches no index, in at most 57 MB: with a clone under 64 MiB.
# FOLDER (default: .wheels) gets the wheels of constraints.txt, and in unsloth/ those of Unsloth, which wants other versions.
# The machine brings torch for CUDA, numpy, pandas, pyarrow, rich, PyYAML, regex, Jinja2 and pytest.
#   PYTHON_VERSION  of that machine (default: 3.12)
#   CUDA            whose library of bitsandbytes is kept (default: 130)
#   UNSLOTH         packages of its folder; empty: none
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "gpu_wheels: $*" >&2; }
folder=${1:-.wheels}
cuda=${CUDA:-130}
most=57000000  # with a clone beside it under 64 MiB
python=.venv/bin/python
[ -x "$python" ] || python=python3
ours=(click anyio idna transformers tokenizers huggingface-hub hf-xet httpx2 httpcore2 truststore trl peft accelerate datasets dill multiprocess xxhash bitsandbytes)
unsloth=${UNSLOTH-unsloth==2026.10.* unsloth_zoo==2026.10.* trl==1.15.* datasets==4.8.5 cut_cross_entropy tyro msgspec hf_transfer torchao transformers==5.17.* dill multiprocess xxhash}
platforms=(--platform any)
for glibc in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

fetch() {  # FOLDER REQUIREMENT...
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --implementation cp \
        --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$@"
}

# Without the files below these prefixes, of which the wheel's record no longer speaks either.
repack() {  # WHEEL KEPT-OR-DROPPED-PATTERN
    "$python" - "$@" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

path, dropped = Path(sys.argv[1]), re.compile(sys.argv[2])
smaller = path.with_suffix(".part")
with zipfile.ZipFile(path) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
    for entry in old.infolist():
        if dropped.search(entry.filename):
            continue
        content = old.read(entry)
        if entry.filename.endswith(".dist-info/RECORD"):
            lines = content.decode().splitlines(keepends=True)
            content = "".join(line for line in lines if not dropped.search(line.partition(",")[0])).encode()
        new.writestr(entry, content)
smaller.replace(path)
PYTHON
}

rm -rf "$folder"
mkdir -p "$folder"
wanted=()
for name in "${ours[@]}"; do
    pin=$(grep -m1 -i "^$name==" constraints.txt) || pin=$name
    wanted+=("$pin")
done
fetch "$folder" "${wanted[@]}"
repack "$folder"/bitsandbytes-*.whl "libbitsandbytes_(?!cuda$cuda\\.so)"
if [ -n "$unsloth" ]; then
    read -ra names <<<"$unsloth"
    fetch "$folder/unsloth" "${names[@]}"
    repack "$folder"/unsloth/unsloth-*.whl '^studio/|/studio/'
fi
size=$(du -sb "$folder" | cut -f1)
say "$folder: $((size / 1000000)) MB"
if [ "$size" -gt "$most" ]; then
    say "more than $((most / 1000000)) MB; the largest:"
    du -ab "$folder" | sort -rn | head -n 8 >&2
    exit 1
fi
