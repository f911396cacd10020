"""The prepared measurement of a GPU, rehearsed with tiny shapes on whatever there is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.experts import EXPERTS
from benchmarks.gpu_slot import CASES, Result, commit, run_case, run_slot
from benchmarks.train import PROGRAMS, SIZES, Case, parameters

ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *words: str) -> list[dict[str, object]]:
    """The lines that the command appends."""
    command = [sys.executable, "-m", "benchmarks.gpu_slot", "--rehearse", "--out", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_cases() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    for case in CASES:
        assert case.program in PROGRAMS and (not case.size or case.size in {**SIZES, **EXPERTS}), case.name
        assert case.tiny().size == ("tiny experts" if case.size in EXPERTS else "tiny" if case.size else "")
    made: set[str] = set()
    for case in CASES:  # no training waits for a model to be made
        if case.program == "make":
            made.add(case.size)
        elif case.program in ("ours", "peer", "unsloth"):
            assert case.size in made, case.name


def test_sizes() -> None:
    assert parameters("1.1B") == 1_100_048_384  # TinyLlama's card
    assert parameters("8B") == 8_030_261_248  # Llama 3.1's
    assert parameters("30B-A3B") == 3_353_032_704  # of 30.5 B, which its card calls 3.3 B activated


def test_a_case_that_fails_and_one_that_takes_too_long(tmp_path: Path) -> None:
    failed = run_case(Case("no program", "nothing", size=""), tmp_path, 60)
    assert (failed.status, failed.message) == ("failed", "KeyError: 'nothing'")
    late = run_case(Case("late", "limit", size="").tiny(), tmp_path, 0.05)
    assert late.status == "too long"
    results = list(run_slot([Case("first", "limit", size=""), Case("second", "limit", size="")], 1))
    assert [(result.case, result.status) for result in results] == [("first", "not run"), ("second", "not run")]
    line = json.loads(Result("a", "ok", 1.0, {"step": 2.0}).line({"commit": commit()}))
    assert line["figures"] == {"step": 2.0} and line["commit"] == commit()


def test_an_unknown_case() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_slot", "--cases", "ourz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--cases ourz: unknown, expected some of limit; tests;" in done.stderr


@pytest.mark.engine
def test_it_goes_on_after_a_case_that_fails(tmp_path: Path) -> None:
    """Unsloth is in a folder of its own, which is not there."""
    lines = rehearse(tmp_path / "gpu.jsonl", "--cases", "Unsloth;now;limit", "--minutes", "5")
    assert [line["status"] for line in lines] == ["not run", "ok", "ok"]
    ours = lines[1]["figures"]
    assert isinstance(ours, dict)
    assert ours["tokens_per_second"] > 0 and ours["kernels"] > 100 and 0 < ours["step"] < 60
    assert ours["losses"]["1"] == pytest.approx(7.3, abs=0.4), "ln 1536: a random model guesses"


@pytest.mark.slow
def test_every_case(tmp_path: Path) -> None:
    lines = rehearse(tmp_path / "gpu.jsonl", "--minutes", "20")
    status = {str(line["case"]): line["status"] for line in lines}
    assert list(status) == [case.name for case in CASES]
    not_here = {case.name for case in CASES if case.program == "unsloth"}
    assert {name for name, word in status.items() if word != "ok"} == not_here
    resumed = next(line["figures"] for line in lines if line["case"] == "resume")
    assert isinstance(resumed, dict) and resumed["equal_tensors"] == resumed["tensors"] == 28


def test_a_bare_machine_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu_slot.sh", tmp_path / "scripts")
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "gpu_slot.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "gpu_slot: no .venv (make setup) and no .wheels (scripts/gpu_wheels.sh)\n"
