"""``evaluate --dry-run`` and ``compare --dry-run``: what would be asked, and which gates so many items can decide."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora2serve as api
from lora2serve.api.compare_models import run_comparison
from lora2serve.api.evaluate_model import run_evaluation
from lora2serve.cli import run as command
from lora2serve.errors import Lora2ServeError
from lora2serve.evaluation import stats
from lora2serve.evaluation.score_gates import foresee, judge, parse_gate
from lora2serve.parity_check import installed_engines
from lora2serve.system import scratch
from tests.support.folders import content
from tests.support.tiny import make_adapter, make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter and a suite of forty items in two tasks."""
    root = tmp_path_factory.mktemp("planned")
    make_adapter(root / "mayor", make_model(root / "base"))
    rows = [{"prompt": f"{n}?", "expected": str(n), "task": "ab"[n % 4 == 0]} for n in range(40)]
    (root / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "bad.jsonl").write_text('{"prompt": 5}\n')
    (root / "file").write_text("")
    return root


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def evaluation(**words: Any) -> api.EvaluationRequest:
    return api.EvaluationRequest(**{"model": ("mayor",), "suite": "qa.jsonl", **words})


def comparison(**words: Any) -> api.CompareRequest:
    return api.CompareRequest(**{"first": "mayor", "second": "base", "suite": "qa.jsonl", **words})


def test_what_would_be_asked(here: Path) -> None:
    before = content(here)
    plan = api.plan_evaluation(evaluation(against="base", gate=("acc >= 0.5", "acc-b >= base", "tokens <= 9")))
    assert (plan.command, plan.suite, plan.scorer, plan.items) == ("evaluate", "qa", "normalized", 40)
    assert plan.tasks == {"a": 30, "b": 10} and plan.page == "evals/mayor/report/qa/report.html"
    assert [(model.name, model.engine.name, model.records) for model in plan.models] == [
        ("mayor", "peft", ("evals/mayor/qa.json",)), ("base", "peft", ("evals/mayor/base/qa.json",)),
    ]  # fmt: skip
    assert plan.models[0].overlap == "not checked: nobody knows what it was trained on"
    found = [(gate.subject, gate.can_be_met) for gate in plan.gates]
    assert found == [("mayor", "yes"), ("mayor", "by a gain"), ("mayor", "yes")]
    assert "with 95 % confidence: 10 items are not enough, a margin is" in plan.gates[1].reason, "of its task"
    several = api.plan_evaluation(evaluation(model=("mayor", "base"), gate=("acc >= 0.5",), out="out", limit=3))
    assert [gate.subject for gate in several.gates] == ["mayor", "base"] and several.items == 3
    assert [model.records for model in several.models] == [("out/qa.mayor.json",), ("out/qa.base.json",)]
    assert content(here) == before


def test_what_would_be_compared(here: Path) -> None:
    before = content(here)
    plan = api.plan_comparison(comparison(gate=("changed <= 0.2", "kl <= other + 0.1")))
    assert plan.command == "compare" and plan.page == "evals/mayor/compared/base/report/qa/report.html"
    assert [len(model.records) for model in plan.models] == [2, 1], "the first is asked twice"
    assert [(gate.subject, gate.can_be_met) for gate in plan.gates] == [("base", "yes")] * 2
    assert content(here) == before


@pytest.mark.parametrize(
    ("text", "count"),
    [("acc >= 0.9", 25), ("acc >= base - 0.05", 52), ("changed <= 0.05", 52), ("exact_match-b >= 0.5", 3)],
)
def test_as_many_items_as_it_says(text: str, count: int) -> None:
    """The number that is named is enough, and the next smaller one is not."""
    gate = parse_gate(text)
    assert foresee(gate, "m", count, None).can_be_met == "yes"
    less = foresee(gate, "m", count - 1, None)
    assert less.can_be_met != "yes" and f"{count} would be" in less.reason


def test_no_number_of_items_in_groups() -> None:
    """More items in the same groups may decide nothing."""
    for text, count in (("acc >= 0.9", 24), ("acc >= base - 0.05", 50)):
        gate, told = parse_gate(text), r"items are not enough, \d+ would be$"
        grouped = foresee(gate, "m", count, ["a", "b"] * (count // 2))
        assert grouped.can_be_met != "yes" and not re.search(told, grouped.reason)
        assert re.search(told, foresee(gate, "m", count, None).reason), "the control"


def test_what_a_gain_meets() -> None:
    """A gate against a base that knows nothing: two that are alike would not meet it."""
    gate = parse_gate("acc >= base - 0.01")
    assert foresee(gate, "m", 40, None).can_be_met == "by a gain"
    assert judge(gate, "m", [1.0] * 40, [0.0] * 40, None).met
    assert foresee(gate, "m", 2, None).can_be_met == "no"
    assert not judge(gate, "m", [1.0] * 2, [0.0] * 2, None).met


@pytest.mark.parametrize("text", ["seconds <= 2", "seconds <= 1", "f1 >= 0.95", "tokens >= base - 3", "judge >= 0.5"])
def test_figures_of_any_value(text: str) -> None:
    """Their interval is a bootstrap's, which ten groups have."""
    gate = parse_gate(text)
    assert foresee(gate, "m", stats.FEWEST, None).can_be_met == "yes"
    assert foresee(gate, "m", stats.FEWEST - 1, None).can_be_met == "no"
    assert foresee(gate, "m", 100, ["a", "b"] * 50).can_be_met == "no", "two groups"


REFUSED: tuple[dict[str, Any], ...] = (
    {"suite": "bad.jsonl"}, {"suite": "none.yaml"}, {"suite": None}, {"limit": 0}, {"gate": ("acc > 1",)},
    {"gate": ("accc >= 0.5",)}, {"gate": ("acc >= 5",)}, {"gate": ("qb.acc >= 0.5",)}, {"url_model": "x"},
    {"out": "file/x"},
)  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [*REFUSED, {"model": ("maior",)}, {"against": "mayor"}, {"gate": ("acc >= base - 0.1",)}, {"shots": 1},
     {"task": ("arc_easy",)}],
)  # fmt: skip
def test_it_refuses_what_evaluate_does(here: Path, words: dict[str, Any]) -> None:
    refused(here, lambda: api.plan_evaluation(evaluation(**words)), lambda: run_evaluation(evaluation(**words)))


@pytest.mark.parametrize("words", [*REFUSED, {"first": "maior"}, {"second": "mayor"}])
def test_it_refuses_what_compare_does(here: Path, words: dict[str, Any]) -> None:
    refused(here, lambda: api.plan_comparison(comparison(**words)), lambda: run_comparison(comparison(**words)))


def refused(here: Path, plan: Callable[[], object], run: Callable[[], object]) -> None:
    before, found = content(here), []
    for call in (plan, run):
        with pytest.raises((Lora2ServeError, OSError)) as caught:
            call()
        found.append((type(caught.value), str(caught.value), getattr(caught.value, "hint", "")))
    assert found[0] == found[1] and content(here) == before


def test_an_engine_that_is_not_here(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "mayor", "--suite", "qa.jsonl", "--gate", "acc >= 0.99", "--dry-run"]
    assert command(words) == 0
    out, err = capfd.readouterr()
    assert "qa: 40 items of qa.jsonl, scored by normalized" in out and "not installed" not in out
    assert re.search(r"^acc >= 0\.99 +mayor +no +at best: 40 items are not enough, 268 would be$", out, re.MULTILINE)
    assert re.search(r"^mayor +peft +yes +not checked", out, re.MULTILINE)
    assert not set(out) & {"─", "\x1b"} and "acc" not in err, "the plan is the result, in plain text"
    assert command(["compare", "mayor", "base", "--suite", "qa.jsonl", "--gate", "changed <= 0.2", "--dry-run"]) == 0
    assert re.search(r"^changed <= 0\.2 +base +yes ", capfd.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(installed_engines, "find_spec", lambda name: None)
    assert command([*words, "--json"]) == 0
    (model,) = json.loads(capfd.readouterr().out)["models"]
    assert model["engine"]["missing"] == "torch, transformers, peft: not installed"
    assert model["engine"]["fix"] == "pip install 'lora2serve[train]'"


def test_what_was_left_out_of_the_suite(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "expected": "b"}] * 2
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(["evaluate", "mayor", "--suite", str(tmp_path / "twice.jsonl"), "--dry-run"]) == 0
    (note,) = api.plan_evaluation(evaluation(suite=tmp_path / "twice.jsonl")).notes
    out, err = capfd.readouterr()
    assert note in out and note not in err


def test_a_mistyped_base(here: Path) -> None:
    """It is a name like that of a model, too."""
    for name, near in (("bsae", True), ("other/model", False)):
        for call in (
            lambda name=name: api.plan_evaluation(evaluation(against=name)),
            lambda name=name: api.plan_comparison(comparison(second=name)),
        ):
            with pytest.raises(Lora2ServeError, match=name) as caught:
                call()
            assert ("did you mean 'base'?" in caught.value.message) == near


def test_requests_of_other_types() -> None:
    for call, message in (
        (lambda: api.EvaluationRequest(limit="5"), "limit: '5'"),  # type: ignore[arg-type]
        (lambda: api.CompareRequest(first=5, second="b"), "first: 5"),  # type: ignore[arg-type]
        (lambda: replace(api.ParityRequest(), thresholds={"a": "b"}), "thresholds"),
    ):
        with pytest.raises(Lora2ServeError, match=message):
            call()


def test_no_folder_is_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor removed: a true evaluation may begin to write into it meanwhile."""

    def made(folder: Path) -> None:
        raise AssertionError(folder)

    monkeypatch.setattr(scratch, "filled", made)
    assert api.plan_evaluation(evaluation(out="new/scores")).items == 40
    assert api.plan_comparison(comparison(out="new/scores")).items == 40
    with pytest.raises(AssertionError, match="scores"):
        run_evaluation(evaluation(out="new/scores"))
