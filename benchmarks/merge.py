"""Time and memory of the merge, each as a whole process: ``make bench-merge``.

Llama-shaped models of random weights (bf16) and rank-16 adapters on all linears, in a scratch folder. At three sizes
the export beside a durable copy (``cp`` and a sync), in turns, from a base that is not cached; at 2.2 GB beside PEFT.
Writes benchmarks/merge.json and prints tables.
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
from math import prod
from pathlib import Path
from statistics import median

from benchmarks import measure
from benchmarks.measure import ROOT, Cost, cost, machine, repeat
from benchmarks.models import shapes

TIMES = 3
LAYERS = {"0.3B": 3, "3B": 65, "6.5B": 145}  # beside a durable copy
BESIDE_PEFT = 22  # layers: 1.1B
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
IMPORTS = """
import torch
import lora2serve.api.export_model, lora2serve.exporting.stream, lora2serve.exporting.open_model
import converters.vllm.vllm_sink
"""


@dataclass(frozen=True)
class BesideCopy:
    """One size: medians of the rounds, in each of which both ran."""

    bytes: int  # of the base
    copy: Cost
    export: Cost
    ratio: float  # of the wall times


def ours(root: Path, base: str, out: Path) -> list[str]:
    """The command line of one export."""
    words = ["export", str(root / "adapter"), "--base", str(root / base), "--target", "vllm", "--out", str(out)]
    return [sys.executable, "-m", "lora2serve", "--quiet", *words]


def durable_copy(base: Path, out: Path) -> list[str]:
    """``cp``, and what it copied on the disk."""
    return ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(base), str(out)]


def beside_copy(root: Path) -> BesideCopy:
    """Both in turns, from a base that is not cached into an empty folder."""
    out, base = root / "out", root / "base"
    rounds: list[list[Cost]] = []
    for _ in range(TIMES):
        rounds.append([])
        for command in (durable_copy(base, out), ours(root, "base", out)):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            drop_cached(base)
            rounds[-1].append(cost(command))
    shutil.rmtree(out)
    copies, exports = zip(*rounds, strict=True)
    ratio = median(export.wall / copy.wall for copy, export in rounds)
    return BesideCopy(measure.size(base), measure.median(copies), measure.median(exports), round(ratio, 2))


def drop_cached(folder: Path) -> None:
    """Let the page cache forget its files, as after a fresh start."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def sizes(folder: Path) -> dict[str, BesideCopy]:
    """Every size that the disk has room for, base and output; a word for one that it has not."""
    found = {}
    for name, layers in LAYERS.items():
        needed = 2 * 2 * sum(prod(shape) for shape in shapes(layers).values()) + (1 << 30)
        free = shutil.disk_usage(folder).free
        if free < needed:
            print(f"{name}: skipped, {needed / 1e9:.0f} GB of disk needed, {free / 1e9:.0f} free", file=sys.stderr)
            continue
        root = folder / name
        make(root, layers, nf4=False)
        found[name] = beside_copy(root)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        shutil.rmtree(root)
    return found


def beside_peft(root: Path) -> dict[str, Cost]:
    """Other ways to the same weights, each the median of ``TIMES`` runs into an empty folder."""
    make(root, BESIDE_PEFT, nf4=True)
    out = root / "out"

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    commands = {
        "cp": ["cp", "-r", str(root / "base"), str(out)],
        "cp, then sync": durable_copy(root / "base", out),
        "PEFT merge_and_unload": [sys.executable, "-c", PEFT, str(root / "base"), str(root / "adapter"), str(out)],
        "lora2serve, from bf16": ours(root, "base", out),
        "lora2serve, from NF4": ours(root, "nf4", out),
        "the imports alone": [sys.executable, "-c", IMPORTS],
    }
    found = {}
    for name, command in commands.items():
        found[name] = repeat(command, TIMES, clear)
        print(f"{name}: {found[name].wall:.1f} s, {found[name].peak / 1e6:.0f} MB", file=sys.stderr, flush=True)
    shutil.rmtree(root)
    return found


def make(root: Path, layers: int, *, nf4: bool) -> None:
    """The model, in processes of their own: this one must stay small."""
    command = [sys.executable, "-m", "benchmarks.models"]
    subprocess.run([*command, str(root), str(layers)], cwd=ROOT, check=True)
    if nf4:
        subprocess.run([*command, "--nf4", str(root)], cwd=ROOT, check=True)


def tables(copied: dict[str, BesideCopy], found: dict[str, Cost]) -> list[str]:
    """Markdown: beside a durable copy, and beside PEFT with that copy as one."""
    lines = ["| | `cp` and sync | export | ratio | CPU of both | peak memory |", "|---|---|---|---|---|---|"]
    for name, one in copied.items():
        lines.append(
            f"| {name}, {one.bytes / 1e9:.1f} GB | {one.copy.wall:.1f} s | {one.export.wall:.1f} s | {one.ratio:.2f} | "
            f"{one.copy.cpu:.1f} s, {one.export.cpu:.1f} s | {one.export.peak / 1e6:.0f} MB |"
        )
    lines += ["", "| | wall | against cp and sync | CPU | peak memory |", "|---|---|---|---|---|"]
    for name, one_way in found.items():
        ratio = one_way.wall / found["cp, then sync"].wall
        lines.append(
            f"| {name} | {one_way.wall:.1f} s | {ratio:.1f} | {one_way.cpu:.1f} s | {one_way.peak / 1e6:.0f} MB |"
        )
    return lines


def main(arguments: Sequence[str]) -> None:
    """Measure; the scratch folder may be named and needs 28 GB for the largest size."""
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=arguments[0] if arguments else None) as folder:
        copied = sizes(Path(folder))
        found = beside_peft(Path(folder) / "1.1B")
    result = {
        "machine": machine(),
        "command": "make bench-merge",
        "load": [round(load[0], 1), round(os.getloadavg()[0], 1)],  # before and after: 0 on a machine of one's own
        "beside_durable_copy": {name: asdict(one) for name, one in copied.items()},
        "runs": {name: asdict(one) for name, one in found.items()},
        "peak_above_imports": {name: one.peak - found["the imports alone"].peak for name, one in found.items()},
    }
    (ROOT / "benchmarks" / "merge.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(tables(copied, found)))


if __name__ == "__main__":
    main(sys.argv[1:])
