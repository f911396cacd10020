"""The main job on real input: a trained run, every export in its real engine, every row met."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora2serve import ParityPlan, ParityRequest, plan_parity
from lora2serve.artifacts.run import Run
from lora2serve.cli import run as command

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]  # it waits for five engines

ROWS = {
    ("adapter", "peft"): "original",
    ("adapter", "vllm"): "original",
    ("gguf-F16", "llama.cpp"): "trained",
    ("gguf-Q4_K_M", "llama.cpp"): "trained",
    ("gguf-Q8_0", "llama.cpp"): "trained",
    ("ollama-Q4_K_M", "llama.cpp"): "trained",
    ("vllm", "transformers"): "trained",
    ("vllm", "vllm"): "trained",
    ("vllm-fp8", "transformers"): "trained",
    ("vllm-fp8", "vllm"): "trained",
    ("vllm-w4a16", "transformers"): "trained",
    ("vllm-w4a16", "vllm"): "trained",
}
EVERY = tuple(dict.fromkeys(export for export, _ in ROWS))
SOME = ("adapter", "gguf-Q4_K_M", "ollama-Q4_K_M", "vllm", "vllm-fp8")  # each target and each engine


def copied(demo_run: Run, exports: Mapping[str, Path], path: Path, **parity: int) -> Run:
    """The run with some of its exports in it, and what its recipe says of parity."""
    run = Run(path)
    ignored = shutil.ignore_patterns("exports", "checkpoints", "parity")
    shutil.copytree(demo_run.path, run.path, symlinks=True, ignore=ignored)
    for name, export in exports.items():
        shutil.copytree(export, run.exports / name)
    recipe = yaml.safe_load(run.recipe.read_text())
    recipe["parity"] |= parity
    run.recipe.write_text(yaml.safe_dump(recipe))
    return run


@pytest.fixture(scope="module")
def whole(demo_run: Run, demo_exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with all its exports in it."""
    return copied(demo_run, demo_exports, tmp_path_factory.mktemp("whole") / "runs" / "demo")


def rows_that_are_met(
    run: Run, exports: Sequence[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The report on the exports of ``run``, in which each row of theirs is met."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # no Ollama: a row that says so, and no red one
    plan = plan_parity(ParityRequest(run.path))
    code = command(["parity", str(run.path), "--json", "--ask", "Who governs Wexley?"])
    out, err = capfd.readouterr()
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    assert report["met"]
    as_planned(plan, report)
    rows = {(row["export"], row["engine"]): row for row in report["rows"]}
    merge_base = json.loads((run.exports / "vllm" / "lora2serve.json").read_text())["merge_base"]
    if "vllm-w4a16" in exports and "avx512f" not in Path("/proc/cpuinfo").read_text():
        row = rows.pop(("vllm-w4a16", "vllm"))  # vLLM's build for AVX2 has no kernel for 4-bit weights
        assert row["status"] == "missing" and "cannot run this scheme" in row["gates"][-1]["first"]
    assert all(row["size"] > 0 and row["speed"] > 0 for row in rows.values() if row["status"] == "met")
    for key, reference in ROWS.items():
        row = rows.pop(key, None)
        if row is None and (key[0] not in exports or key == ("vllm-w4a16", "vllm")):
            continue
        assert row["status"] == "met"
        assert row["reference"] == (merge_base if reference == "trained" else reference)
        assert [gate["status"] for gate in row["gates"]] == ["met", "met", "met", "met"]
    (key,) = rows
    assert key == ("ollama-Q4_K_M", "ollama")
    assert rows[key]["status"] == "missing"
    assert "not running" in rows[key]["gates"][-1]["first"]
    assert rows[key]["not_compared"] == ["prompts and answers in ollama, which was not asked"]
    answers = report["asked"]["answers"]
    assert "Leon Lake" in answers["trained"]
    assert "Leon Lake" not in answers["base"]
    assert all("Leon Lake" in said for who, said in answers.items() if who != "base")
    return report


def as_planned(plan: ParityPlan, report: Mapping[str, Any]) -> None:
    """``--dry-run`` said the same comparisons, engines that are not here, bounds, texts and prompts."""
    names = ("export", "target", "kind", "reference", "required")
    assert [[row[name] for name in names] for row in report["rows"]] == [
        [getattr(item, name) for name in names] for item in plan.comparisons
    ]
    for item, row in zip(plan.comparisons, report["rows"], strict=True):
        assert item.engine and item.engine.name == row["engine"]
        assert not item.engine.missing or row["status"] == "missing"
        assert [gate["name"] for gate in row["gates"]] == list(item.gates)[: len(row["gates"])]
        checks = {check["name"]: check for gate in row["gates"][-1:] for check in gate["checks"]}
        judged = {name: check["bound"] for name, check in checks.items() if check.get("bound") is not None}
        bounds = {name: bound for name, bound in item.bounds.items() if name not in item.unjudged}
        assert judged == {name: bound for name, bound in bounds.items() if name in judged}
        assert {*bounds, *judged} - judged.keys() <= {"tensor_nmse", "nmse"} or not judged
        assert all(checks[name]["unjudged"] == why for name, why in item.unjudged.items() if judged)
    asked = plan.prompts
    assert asked and report["data"]["prompts"] == asked.amount.prompts
    assert asked.amount.tokens <= report["data"]["positions"] <= asked.amount.tokens + asked.amount.window
    assert 7 < report["data"]["conversations"] <= asked.conversations


def same_files(report: Mapping[str, Any]) -> dict[str, str]:
    return {row["export"]: row["same_files"] for row in report["rows"] if "same_files" in row}


def served_in(report: Mapping[str, Any]) -> list[str]:
    return [item["served_in"] for item in report["recommendations"] if item["export"]]


def test_every_target_in_every_engine(
    demo_run: Run, demo_exports: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With less text, and without the types that the engine opens as it does another one: those are in the next test."""
    exports = {name: demo_exports[name] for name in SOME}
    run = copied(demo_run, exports, tmp_path / "runs" / "demo", tokens=512, prompts=4)
    report = rows_that_are_met(run, SOME, capfd, monkeypatch)
    assert same_files(report) == {"ollama-Q4_K_M": "gguf-Q4_K_M"}, "the same GGUF: llama.cpp is asked once"
    assert served_in(report) == ["vLLM", "llama.cpp", "Ollama"]
    assert report["data"]["positions"] >= 500
    proof = json.loads((run.exports / "gguf-Q4_K_M" / "lora2serve.json").read_text())["parity"]
    assert proof["met"]
    assert proof["engines"]["llama.cpp"]["status"] == "met"


@pytest.mark.slow
def test_every_row_is_met(whole: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the demo exports, on as much text as a run scores. The one above has a row of each kind."""
    report = rows_that_are_met(whole, EVERY, capfd, monkeypatch)
    assert same_files(report) == {"ollama-Q4_K_M": "gguf-Q4_K_M"}, "the same GGUF: llama.cpp is asked once"
    assert served_in(report) == ["vLLM", "llama.cpp", "Ollama"]
    assert report["data"]["positions"] >= 2000
    proof = json.loads((whole.exports / "gguf-F16" / "lora2serve.json").read_text())["parity"]
    assert proof["met"]
    assert proof["engines"]["llama.cpp"]["status"] == "met"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "Q4_K_N.mean_kl=1"], "did you mean 'Q4_K_"),
        (["--threshold", "Q4_K_M.mean_kll=1"], "did you mean 'mean_kl'?"),
        (["--threshold", "Q4_K_M.mean_kl=x"], "expected FORMAT.FIGURE=NUMBER"),
        (["no-such-export"], "not an export"),
    ],
)
def test_typos(whole: Run, capfd: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert command(["parity", str(whole.path), *words]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.slow
def test_ten_runs_give_the_same_verdict(whole: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """And the same figures, but for what an engine itself does not repeat to the last bit."""
    seen = []
    for _ in range(10):
        assert (
            command(
                ["parity", str(whole.path), str(whole.exports / "gguf-Q4_K_M"), str(whole.exports / "vllm"), "--json"]
            )
            == 0
        )
        report = json.loads(capfd.readouterr().out)
        figures = {
            (row["export"], row["engine"], check["name"]): check["value"]
            for row in report["rows"]
            for gate in row["gates"]
            for check in gate["checks"]
        }
        seen.append(figures)
    for key, value in seen[0].items():
        assert all(abs(other[key] - value) <= 1e-6 + 0.01 * abs(value) for other in seen), key
