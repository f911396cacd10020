"""All that is worth knowing of a GPU that is lent for minutes, in order of value: ``make gpu-slot``.

Each case runs in a process of its own, and its result is appended to benchmarks/gpu.jsonl as it comes: what failed, and
what there was no time for, too. ``--minutes`` (9) bounds the whole, ``--cases`` chooses by name, ``--rehearse`` takes
tiny shapes, which a CPU can do.

The limit is 4 operations a parameter and token (forward, and the gradients of the activations; the weights are frozen
and have none) at the rate of a large bfloat16 product, measured in the first case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import ROOT, machine
from benchmarks.train import RANK, Case

RESULTS = ROOT / "benchmarks" / "gpu.jsonl"
LEAST = 15  # seconds that must be left to begin a case
LONGEST = 120  # seconds of a case
UNSLOTH = "LORA2SERVE_UNSLOTH"  # the folder of Unsloth's packages, which want other versions than ours

BIG = "8B, 8 layers"
MIXTURE = "30B-A3B"  # as recipes/qwen3-30b-a3b.yaml trains it, on a card of 24 GB
# An earlier lora2serve; and each of what changed since, alone. Short runs are compiled here, where they would not be.
BEFORE = {
    "optimizer": "paged_adamw_32bit", "checkpointing": True, "compiled": False, "varlen": False, "casts": False,
}  # fmt: skip
NOW: dict[str, object] = {"compiled": True}
CASES: tuple[Case, ...] = (
    Case("limit", "limit", size=""),
    Case("tests", "tests", size=""),
    Case("make 1.1B", "make"),
    Case("TRL by hand", "peer"),
    Case("as before", "ours", step=BEFORE),
    Case("now", "ours", step=NOW),
    Case("Unsloth", "unsloth"),
    Case("now, 16 rows", "ours", rows=16, step=NOW),
    Case("Unsloth, 16 rows", "unsloth", rows=16),
    Case("make 8B/8", "make", size=BIG),
    Case("8B/8: as before", "ours", size=BIG, step=BEFORE),
    Case("8B/8: now", "ours", size=BIG, step=NOW),
    Case("8B/8: Unsloth", "unsloth", size=BIG),
    Case("make 30B-A3B", "make", size=MIXTURE),
    Case(
        "30B-A3B, 4 bits",
        "ours",
        size=MIXTURE,
        rows=1,
        recipe={"lora": {"rank": RANK, "targets": "attention"}, "gradient_checkpointing": True},
        length=2048,
        warm=2,
        timed=3,
    ),
    Case("no checkpointing", "ours", step={**BEFORE, "checkpointing": False}),
    Case("fused AdamW", "ours", step={**BEFORE, "optimizer": "adamw_torch_fused"}),
    Case("casts hoisted", "ours", step={**BEFORE, "casts": True}),
    Case("compiled", "ours", step={**BEFORE, "compiled": True}),
    Case("short rows, padded", "ours", rows=8, data="short", step={"varlen": False}),
    Case("short rows, varlen", "ours", rows=8, data="short"),
    Case(
        "short rows, packed under a mask",
        "ours",
        rows=2,
        data="short",
        recipe={"packing": True},
        step={"varlen": False},
    ),
    Case("short rows, packed", "ours", rows=2, data="short", recipe={"packing": True}),
    Case("evaluation", "evaluation", size="152k words", rows=8),
    Case("LoRA in 16 bits", "ours", recipe={"quantize": "none"}, step=NOW),
    Case("resume", "resume", step=NOW),
)


@dataclass(frozen=True)
class Result:
    """One line of gpu.jsonl."""

    case: str
    status: str  # ok, failed, too long, not run
    seconds: float
    figures: dict[str, object]
    message: str = ""  # of what failed, its last line

    def line(self, facts: dict[str, object]) -> str:
        """With what is the same for all of a slot."""
        return json.dumps({**asdict(self), **facts})


def run_case(case: Case, folder: Path, seconds: float) -> Result:
    """In a process of its own, which is ended with its children when the time is over."""
    command = [sys.executable, "-m", "benchmarks.train", json.dumps(asdict(case)), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if case.program == "unsloth":
        packages = os.environ.get(UNSLOTH)
        if not packages:
            return Result(case.name, "not run", 0.0, {}, f"{UNSLOTH} names no folder of its packages")
        environment |= {"PYTHONPATH": packages, "UNSLOTH_DISABLE_STATISTICS": "1"}
    started = time.monotonic()
    with (folder / "log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            with_children = os.getpgid(process.pid)
            os.killpg(with_children, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Result(case.name, "too long", time.monotonic() - started, {}, f"ended after {seconds:.0f} s")
        spent = time.monotonic() - started
        log.seek(0)
        words = log.read().splitlines()
    if process.returncode:
        return Result(case.name, "failed", spent, {}, next((line for line in reversed(words) if line.strip()), ""))
    return Result(case.name, "ok", spent, json.loads(output.splitlines()[-1]))


def run_slot(cases: Sequence[Case], seconds: float, longest: float = LONGEST) -> Iterator[Result]:
    """One after the other, in at most that time altogether, and at most ``longest`` seconds of it for each."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gpu-slot-") as folder:
        for case in cases:
            left = end - time.monotonic()
            if left < LEAST:
                yield Result(case.name, "not run", 0.0, {}, f"{left:.0f} s were left")
            else:
                yield run_case(case, Path(folder), min(left, longest))


def commit() -> str:
    """What is measured; empty outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def described(result: Result, flops: float) -> str:
    """One line for a person."""
    figures = result.figures
    words = [f"{result.case}: {result.status} in {result.seconds:.0f} s", result.message]
    if "tokens_per_second" in figures:
        words.append(f"{figures['tokens_per_second']:,} tokens/s, peak {float(str(figures['peak'])) / 1e9:.2f} GB")
    if flops and "parameters" in figures and "tokens_per_second" in figures:
        share = 4 * float(str(figures["parameters"])) * float(str(figures["tokens_per_second"])) / flops
        words.append(f"{share:.0%} of the limit")
    return ", ".join(word for word in words if word)


def main(arguments: Sequence[str]) -> None:
    """Run the cases, append their lines, print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_slot", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all cases together (default 9)")
    parser.add_argument("--cases", help="names, with semicolons between them (default: all)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the file to append to (default benchmarks/gpu.jsonl)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on whatever there is")
    options = parser.parse_args(arguments)
    names = options.cases.split(";") if options.cases else [case.name for case in CASES]
    known = {case.name: case for case in CASES}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--cases {';'.join(unknown)}: unknown, expected some of {'; '.join(known)}")
    cases = [known[name].tiny() if options.rehearse else known[name] for name in names]
    facts: dict[str, object] = {"commit": commit(), "rehearsal": options.rehearse, "host": machine()}
    flops = 0.0
    longest = 60 * options.minutes if options.rehearse else LONGEST  # a CPU is slow
    for result in run_slot(cases, 60 * options.minutes, longest):
        with options.out.open("a", encoding="utf-8") as file:
            file.write(result.line(facts) + "\n")
        flops = float(str(result.figures.get("flops", flops)))
        print(described(result, flops), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the case in hand would go on without us
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("gpu_slot: stopped; what is done is on record", file=sys.stderr)
        sys.exit(130)
