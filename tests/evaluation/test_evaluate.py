"""The demo before and after its training, by ``lora2serve evaluate``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import lora2serve as api
from lora2serve.artifacts.suite_scores import SuiteScores
from lora2serve.errors import InputError, UsageError
from lora2serve.evaluation import stats
from lora2serve.evaluation.eval_records import ItemResult, read_items
from lora2serve.evaluation.suite import HELD_OUT, Suite, SuiteRecipe, of_rows
from tests.conftest import lora2serve
from tests.support.runs import DEMO

pytestmark = pytest.mark.engine
EVALS = Path("runs/demo/evals")


def test_before_and_after(evaluated_demo: Path) -> None:
    report = json.loads((evaluated_demo / "printed.json").read_text())
    tuned, base = report["subjects"]
    assert tuned["figures"]["acc"]["value"] >= 0.9 and base["figures"]["acc"]["value"] <= 0.1
    (found,) = report["differences"]
    assert found["difference"]["p"] < 1e-6 and found["verdict"] == "better" and found["against"] == "base"
    assert [gate["verdict"] for gate in report["gates"]] == ["met", "met"]
    page = evaluated_demo / EVALS / "report/answers/report.html"
    assert "runs/latest is better than base" in page.read_text() or "runs/demo is better than base" in page.read_text()


def rescored(items: Sequence[ItemResult], suite: Suite) -> list[float]:
    return [suite.scorer_of(q).score(item.answer, q) for item, q in zip(items, suite.items, strict=True)]


def test_every_figure_follows_from_the_lines(evaluated_demo: Path) -> None:
    suite_rows = evaluated_demo / "runs/demo/eval.jsonl"
    suite = of_rows(suite_rows, HELD_OUT, SuiteRecipe(str(suite_rows)), suite_rows.parent, 40)
    for place in (EVALS, EVALS / "base"):
        record = SuiteScores.read(evaluated_demo / place / "answers.json")
        items = read_items(evaluated_demo / place / "answers.jsonl")
        assert record.suite_sha256 == suite.sha256 and len(items) == 40
        again = rescored(items, suite)
        assert again == [item.score for item in items]
        estimate = stats.mean(again)
        figure = record.metrics["acc"]
        assert (figure.value, figure.low, figure.high, figure.n) == (estimate.value, estimate.low, estimate.high, 40)
        assert [item.prompt_sha256 for item in items] == [item.prompt_sha256 for item in suite.items]
        assert all(item.seconds > 0 and item.tokens and item.end == "stop" for item in items)
    changed = rescored([replace(items[0], answer="x"), *items[1:]], suite)
    assert changed[0] == 0, "the control"


def test_a_base_is_asked_once(evaluated_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time its answers are known; other items are another suite."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nor from an earlier run of this test
    done = api.evaluate(evaluated_demo / "runs/demo", against="base", limit=3, out=evaluated_demo / "a")
    again = api.evaluate(evaluated_demo / "runs/demo", against="base", limit=3, out=evaluated_demo / "b")
    assert [row.cached for row in done.report.subjects] == [False, False]
    assert [row.cached for row in again.report.subjects] == [False, True]
    words = {"against": "base", "limit": 3, "gate": "seconds <= base + 9", "out": evaluated_demo / "t"}
    timed = api.evaluate(evaluated_demo / "runs/demo", **words)  # type: ignore[arg-type]
    assert [row.cached for row in timed.report.subjects] == [False, False], "its seconds are those of now"
    first, second = (read_items(result.records[1].with_suffix(".jsonl")) for result in (done, again))
    assert first == second
    assert sorted(path.name for path in (evaluated_demo / "a").glob("*.json")) == [
        "answers.base.json",
        "answers.demo.json",
    ]


def test_a_gate_that_is_not_met(evaluated_demo: Path) -> None:
    words = ("evaluate", "--limit", "5", "--gate", "acc >= 0.99", "--out", "few")
    lora2serve(*words, cwd=evaluated_demo, code=3)
    with pytest.raises(UsageError, match="nothing to compare with"):
        api.evaluate(evaluated_demo / "runs/demo", gate="acc >= base - 0.01", limit=5)
    both, rows = [DEMO / "base", evaluated_demo / "runs/demo"], evaluated_demo / "runs/demo/eval.jsonl"
    result = api.evaluate(both, suite=rows, gate="acc >= 0.5", limit=20, out=evaluated_demo / "both")
    assert [gate.verdict for gate in result.report.gates] == ["missed", "met"], "the first, too"


def test_questions_that_were_trained_on(evaluated_demo: Path, tmp_path: Path) -> None:
    train = Path(json.loads((evaluated_demo / "runs/demo/run.json").read_text())["data"]["train"]["path"])
    if not train.is_file():
        pytest.skip("the demo was trained elsewhere")
    trained = tmp_path / "trained.jsonl"
    trained.write_text("".join(train.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(InputError, match="3 of 3 questions were trained on") as refused:
        api.evaluate(evaluated_demo / "runs/demo", suite=trained)
    assert "--allow-overlap" in refused.value.hint
    result = api.evaluate(evaluated_demo / "runs/demo", suite=trained, allow_overlap=True, out=tmp_path / "out")
    assert "3 of 3 questions were trained on" in result.report.subjects[0].overlap


def test_a_version_of_a_registry(evaluated_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores go into the registry, its files stay as they are, and the alias is followed."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    shutil.copytree(evaluated_demo / "runs/demo", source, ignore=shutil.ignore_patterns("evals"))
    with api.Registry.create() as registry:
        registry.add(source, name="island", unproven=True)
        registry.promote("island@1", "champion", force=True, why="a test")
        assert registry.get("island@1").score("answers.acc") is None
    result = api.evaluate("island@champion", limit=3)
    assert result.records == (Path("evals/island@champion/answers.json"),)
    with api.Registry() as registry:
        score = registry.get("island@1").score("answers.acc")
        assert score is not None and score.value == 1.0 and score.suite_sha256 == result.report.suite_sha256
        assert registry.verify() == 1
    compared = api.compare("island@champion", "base", limit=3, out=tmp_path / "compared")
    version, again, base = (read_items(path.with_suffix(".jsonl")) for path in compared.records)
    assert [item.answer for item in version] == [item.answer for item in again] != [item.answer for item in base]
    with pytest.raises(UsageError):
        api.evaluate("island@9", limit=3)


def test_compare_with_its_base(evaluated_demo: Path) -> None:
    """Asked twice the run answers the same; its base does not, from the first token on."""
    words = {"limit": 8, "gate": ("changed <= 0.9",), "out": evaluated_demo / "c"}
    plan = api.plan_comparison(api.CompareRequest(evaluated_demo / "runs/demo", "base", **words))  # type: ignore[arg-type]
    assert not (evaluated_demo / "c").exists()
    result = api.compare(evaluated_demo / "runs/demo", "base", limit=8, gate="changed <= 0.9", out=evaluated_demo / "c")
    assert [path for model in plan.models for path in model.records] == [str(path) for path in result.records]
    assert (plan.page, plan.items) == (str(result.page), result.report.items)
    first, again, second = (read_items(path.with_suffix(".jsonl")) for path in result.records)
    assert [item.answer for item in first] == [item.answer for item in again] != [item.answer for item in second]
    found = {item.metric: item for item in result.report.differences}
    assert found["acc"].verdict == "worse" and found["changed"].verdict == "different"
    assert 0 < found["kl"].difference.value < 1 and all(len(item.first_tokens) == 20 for item in first)
    assert result.report.subjects[1].figures["changed"].value == 0 and not result.met
    assert "base beside" in result.page.read_text()


def test_train_evaluates(tmp_path: Path) -> None:
    """As the recipe says; a suite that is wrong is refused before the training."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    words = ("train", "demo", "--set", "train.steps=2", "--set", "evaluate.limit=4")
    lora2serve(*words, "--set", f"evaluate.suites=[held-out, {tmp_path / 'bad.jsonl'}]", cwd=tmp_path, code=1)
    assert not (tmp_path / "runs").exists()
    lora2serve(*words, "--set", "evaluate.suites=[held-out]", cwd=tmp_path)
    record = SuiteScores.read(tmp_path / EVALS / "answers.json")
    assert record.metrics["acc"].n == 4 and (tmp_path / EVALS / "base/answers.json").is_file()
