"""One pass to GGUF beside the usual chain, each as a whole process: ``make bench-gguf``.

The chain is PEFT's merge, llama.cpp's converter and ``llama_model_quantize`` of the same library; the model is that of
the merge benchmark (1.1B, bf16, rank 16 on all linears). Writes benchmarks/gguf.json and prints a table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import ROOT, Cost, cost, machine, repeat, size
from benchmarks.merge import PEFT

LAYERS = 22
TIMES = 3
KINDS = {"Q4_K_M": 15, "Q8_0": 7, "F16": 1}  # llama.cpp's LLAMA_FTYPE
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# llama.cpp knows a pre-tokenizer by a hash of real vocabularies, which the demo's is not.
CONVERT = """
import runpy, sys
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUANTIZE = """
import ctypes, os, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), len(os.sched_getaffinity(0))
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@dataclass(frozen=True)
class Way:
    """One way to a file: its steps as a whole. ``written`` counts every byte that went to the disk."""

    wall: float
    cpu: float
    peak: int
    written: int

    @classmethod
    def of(cls, steps: Sequence[Cost], *paths: Path) -> Way:
        return cls(
            sum(step.wall for step in steps),
            sum(step.cpu for step in steps),
            max(step.peak for step in steps),
            sum(map(size, paths)),
        )


def chain(root: Path, tree: Path, kind: str) -> Way:
    """PEFT, convert, quantize; llama.cpp's converter makes Q8_0 by itself."""
    merged, converted, quantized = root / "merged", root / "converted.gguf", root / "quantized.gguf"
    steps = [cost([sys.executable, "-c", PEFT, str(root / "base"), str(root / "adapter"), str(merged)])]
    for name in TOKENIZER:
        shutil.copy(root / "base" / name, merged / name)
    first = "q8_0" if kind == "Q8_0" else "f16"
    words = [str(tree / "convert_hf_to_gguf.py"), str(merged), "--outfile", str(converted), "--outtype", first]
    steps.append(cost([sys.executable, "-c", CONVERT, *words], {"PYTHONPATH": f"{tree / 'gguf-py'}:{tree}"}))
    paths = [merged, converted]
    if kind == "Q4_K_M":
        steps.append(cost([sys.executable, "-c", QUANTIZE, str(converted), str(quantized), str(KINDS[kind])]))
        paths.append(quantized)
    way = Way.of(steps, *paths)
    shutil.rmtree(merged)
    for path in paths[1:]:
        path.unlink()
    return way


def one_pass(root: Path, kind: str) -> Way:
    """The median of several exports."""
    out = root / "out"
    words = ["export", str(root / "adapter"), "--base", str(root / "base"), "--target", "gguf", "--quant", kind]
    command = [sys.executable, "-m", "lora2serve", "--quiet", *words, "--out", str(out)]
    found = repeat(command, TIMES, lambda: shutil.rmtree(out, ignore_errors=True))
    return Way.of([found], out)


def main(arguments: Sequence[str]) -> None:
    """Measure; the scratch folder may be named and needs 12 GB."""
    from lora2serve.progress import Silent
    from lora2serve.system.doctor import unpack_source_package

    tree, load = unpack_source_package(Silent()), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bench-gguf-", dir=arguments[0] if arguments else None) as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "benchmarks.models", str(root), str(LAYERS)], cwd=ROOT, check=True)
        for name in TOKENIZER:
            shutil.copy(ROOT / "recipes" / "demo" / "base" / name, root / "base" / name)
        found = {}
        for kind in KINDS:
            found[kind] = {"chain": chain(root, tree, kind), "one pass": one_pass(root, kind)}
            print(f"{kind}: {found[kind]}", file=sys.stderr, flush=True)
    result = {
        "machine": machine(),
        "command": "make bench-gguf",
        "load": [round(load[0], 1), round(os.getloadavg()[0], 1)],  # before and after: 0 on a machine of one's own
        "runs": {kind: {name: asdict(way) for name, way in ways.items()} for kind, ways in found.items()},
        "times_faster": {kind: round(ways["chain"].wall / ways["one pass"].wall, 2) for kind, ways in found.items()},
    }
    (ROOT / "benchmarks" / "gguf.json").write_text(json.dumps(result, indent=2) + "\n")
    print("| | chain | one pass | times faster | peak memory | bytes written |\n|---|---|---|---|---|---|")
    for kind, ways in found.items():
        old, new = ways["chain"], ways["one pass"]
        print(
            f"| {kind} | {old.wall:.1f} s | {new.wall:.1f} s | {old.wall / new.wall:.1f} | {old.peak / 1e6:.0f} MB, "
            f"{new.peak / 1e6:.0f} MB | {old.written / 1e9:.2f} GB, {new.written / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
