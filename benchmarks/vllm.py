"""Quantized exports beside the 16-bit one, each as a whole process: ``make bench-vllm``.

The model is that of the merge benchmark (1.1B, bf16, rank 16 on all linears). The runs of a round follow one another
and the figures are medians over the rounds, so that what else the machine does meets all alike; processor time is told
too. Writes benchmarks/vllm.json and prints a table.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import ROOT, Cost, cost, machine, median, size
from benchmarks.merge import ours

LAYERS = 22
ROUNDS = int(os.environ.get("ROUNDS", "3"))
QUANTS = ("fp8", "fp8-block", "int8", "w8a16", "w4a16", "nvfp4", "mxfp4")
PLAIN, ALL = "16 bits", "all seven, one pass"


def commands(root: Path) -> dict[str, list[str]]:
    """What is measured, by its name."""
    plain = ours(root, "base", root / "out")
    found = {PLAIN: plain} | {quant: [*plain, "--quant", quant] for quant in QUANTS}
    return found | {ALL: [*plain, *(word for quant in QUANTS for word in ("--quant", quant))]}


def run_all(root: Path) -> tuple[dict[str, list[Cost]], dict[str, int]]:
    """Every command, ``ROUNDS`` times, and how many bytes each wrote."""
    runs: dict[str, list[Cost]] = {}
    written: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, command in commands(root).items():
            shutil.rmtree(root / "out", ignore_errors=True)
            os.sync()
            runs.setdefault(name, []).append(cost(command))
            written[name] = size(root / "out")
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs, written


def main(arguments: Sequence[str]) -> None:
    """Measure; the scratch folder may be named and needs 12 GB."""
    with tempfile.TemporaryDirectory(prefix="bench-vllm-", dir=arguments[0] if arguments else None) as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "benchmarks.models", str(root), str(LAYERS)], cwd=ROOT, check=True)
        runs, written = run_all(root)
    found = {name: median(costs) for name, costs in runs.items()}
    ratios = {
        figure: {
            name: round(statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in pairs), 2)
            for name, costs in runs.items()
            for pairs in [list(zip(costs, runs[PLAIN], strict=True))]
        }
        for figure in ("wall", "cpu")
    }
    result = {
        "machine": machine(),
        "command": "make bench-vllm",
        "rounds": ROUNDS,
        "load_at_the_end": round(os.getloadavg()[1], 1),
        "runs": {name: {**asdict(one), "written": written[name]} for name, one in found.items()},
        "wall_to_16_bits": ratios["wall"],
        "cpu_to_16_bits": ratios["cpu"],
    }
    (ROOT / "benchmarks" / "vllm.json").write_text(json.dumps(result, indent=2) + "\n")
    print("| | wall | to 16 bits | CPU | to 16 bits | peak memory | written |\n|---|---|---|---|---|---|---|")
    for name, one in found.items():
        print(
            f"| {name} | {one.wall:.1f} s | {ratios['wall'][name]:.2f} | {one.cpu:.1f} s | {ratios['cpu'][name]:.2f} "
            f"| {one.peak / 1e6:.0f} MB | {written[name] / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
