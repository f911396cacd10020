"""Time and memory of the merge, beside ``cp`` and PEFT, each as a whole process: ``make bench-merge``.

Makes a 1.1B Llama-shaped model (bf16, 2.2 GB) and a rank-16 adapter on all linears in a scratch folder, measures the
median of three, and then the peak memory at 0.5, 1.1 and 3B. Writes benchmarks/merge.json and prints a table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import ROOT, Cost, cost, machine, repeat

TIMES = 3
LAYERS = {"0.5B": 9, "1.1B": 22, "3B": 65}
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
IMPORTS = """
import torch
from lora2serve import console, exporter, stream, model, run, adapter
import converters.vllm
"""


def ours(root: Path, base: str, out: Path) -> list[str]:
    """The command line of one export."""
    words = ["export", str(root / "adapter"), "--base", str(root / base), "--target", "vllm", "--out", str(out)]
    return [sys.executable, "-m", "lora2serve", "--quiet", *words]


def run_all(root: Path) -> dict[str, Cost]:
    """Everything on one model, each the median of ``TIMES`` runs into an empty folder."""
    out = root / "out"

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    commands = {
        "cp": ["cp", "-r", str(root / "base"), str(out)],
        "cp, then sync": ["sh", "-c", f"cp -r {root / 'base'} {out} && sync -f {out}"],
        "PEFT merge_and_unload": [sys.executable, "-c", PEFT, str(root / "base"), str(root / "adapter"), str(out)],
        "lora2serve, from bf16": ours(root, "base", out),
        "lora2serve, from NF4": ours(root, "nf4", out),
        "the imports alone": [sys.executable, "-c", IMPORTS],
    }
    found = {}
    for name, command in commands.items():
        found[name] = repeat(command, TIMES, clear)
        print(f"{name}: {found[name].wall:.1f} s, {found[name].peak / 1e6:.0f} MB", file=sys.stderr, flush=True)
    clear()
    return found


def make(root: Path, layers: int, *, nf4: bool) -> None:
    """The model, in processes of their own: this one must stay small."""
    command = [sys.executable, "-m", "benchmarks.models"]
    subprocess.run([*command, str(root), str(layers)], cwd=ROOT, check=True)
    if nf4:
        subprocess.run([*command, "--nf4", str(root)], cwd=ROOT, check=True)


def table(found: dict[str, Cost]) -> list[str]:
    """Markdown, with ``cp`` as one."""
    lines = ["| | wall | against cp | CPU | peak memory |", "|---|---|---|---|---|"]
    for name, one in found.items():
        ratio = one.wall / found["cp"].wall
        lines.append(f"| {name} | {one.wall:.1f} s | {ratio:.1f} | {one.cpu:.1f} s | {one.peak / 1e6:.0f} MB |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Measure; the scratch folder may be named and needs 15 GB."""
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=arguments[0] if arguments else None) as folder:
        peaks: dict[str, int] = {}
        for size, layers in LAYERS.items():
            root = Path(folder) / size
            make(root, layers, nf4=size == "1.1B")
            if size == "1.1B":
                found = run_all(root)
                peaks[size] = found["lora2serve, from bf16"].peak
            else:
                peaks[size] = cost(ours(root, "base", root / "out")).peak
            shutil.rmtree(root)
    imports = found["the imports alone"].peak
    result = {
        "machine": machine(),
        "command": "make bench-merge",
        "runs": {name: asdict(one) for name, one in found.items()},
        "ratio_to_cp": {name: round(one.wall / found["cp"].wall, 2) for name, one in found.items()},
        "peak_above_imports": {name: one.peak - imports for name, one in found.items()},
        "peak_by_size": peaks,
    }
    (ROOT / "benchmarks" / "merge.json").write_text(json.dumps(result, indent=2) + "\n")
    above = (found["lora2serve, from bf16"].peak - imports) / 1e6
    print("\n".join(table(found)))
    print(f"peak memory above the imports: {above:.0f} MB from bf16")
    print("peak memory by size: " + ", ".join(f"{size} {peak / 1e6:.0f} MB" for size, peak in peaks.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
