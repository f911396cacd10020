"""Items put to an engine that is planted: what is no number, what was not answered, and what is kept of it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lora2serve.api.evaluate_model import distinct
from lora2serve.artifacts.suite_scores import NAME
from lora2serve.errors import EngineError
from lora2serve.evaluation import answer_cache
from lora2serve.evaluation.answerer import EngineAnswer, Turns
from lora2serve.evaluation.harness_options import HarnessOptions
from lora2serve.evaluation.harness_tasks import figure_names
from lora2serve.evaluation.suite import Suite, read_suite
from lora2serve.evaluation.suite_run import ask_all, evaluation, metric_names
from lora2serve.parity_check.chat_models import ChatModel
from tests.support.runs import Told

FORK = multiprocessing.get_context("fork")
MODEL = ChatModel("planted", "peft", {})


@dataclass
class PlantedEngine:
    """Answers one question after the other with these."""

    values: list[list[float]]
    asked: list[str] = field(default_factory=list)

    def answer(self, messages: Turns, max_tokens: int, temperature: float, base: bool) -> EngineAnswer:
        return EngineAnswer(error="it takes no questions")

    def likelihoods(self, messages: Turns, texts: Sequence[str], base: bool) -> EngineAnswer:
        self.asked += texts
        return EngineAnswer(values=self.values.pop(0), seconds=0.1)

    def first_tokens(self, messages: Turns, base: bool) -> dict[str, float]:
        return {}


def suite_of(folder: Path, *tasks: str, scorer: str = "choice") -> Suite:
    rows = [{"prompt": f"{n}?", "choices": ["a", "b"], "expected": "a", "task": task} for n, task in enumerate(tasks)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qa.yaml").write_text(f"rows: qa.jsonl\nscorer: {scorer}\n")
    return read_suite(folder / "qa.yaml")


def test_a_likelihood_that_is_no_number_is_no_answer(tmp_path: Path) -> None:
    """Not the first choice, which may be the right one. Minus infinity is a number: the control."""
    suite, told, nan, never = suite_of(tmp_path, "", "", ""), Told(), float("nan"), float("-inf")
    measured = ask_all(PlantedEngine([[nan, nan], [-1.0, never], [-2.0, nan]]), "planted", MODEL, suite, told)
    assert [item.score for item in measured.items] == [0.0, 1.0, 0.0]
    assert [bool(item.error) for item in measured.items] == [True, False, True] and measured.failed() == 2
    assert evaluation(measured, suite).failed == 2 and "2 of 3 items were not answered" in told.warnings[0]
    with pytest.raises(EngineError, match="no item was answered: it takes no questions"):
        ask_all(PlantedEngine([]), "planted", MODEL, suite_of(tmp_path, "", scorer="exact"), told)


def test_choices_that_are_as_likely(tmp_path: Path) -> None:
    """A model that knows nothing has half of them right, wherever the right one stands: here it is the first."""
    suite = suite_of(tmp_path, *[""] * 200)
    measured = ask_all(PlantedEngine([[-1.0, -1.0] for _ in suite.items]), "planted", MODEL, suite, Told())
    assert 70 < sum(item.score for item in measured.items) < 130
    again = ask_all(PlantedEngine([[-1.0, -1.0] for _ in suite.items]), "planted", MODEL, suite, Told())
    assert [item.answer for item in measured.items] == [item.answer for item in again.items]
    surer = ask_all(PlantedEngine([[-1.0, -1.1] for _ in suite.items]), "planted", MODEL, suite, Told())
    assert all(item.score == 1 for item in surer.items), "the control"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """Its answers are here all the same."""
    (tmp_path / "file").write_text("")
    suite = suite_of(tmp_path, "")
    measured = ask_all(PlantedEngine([[-1.0, -2.0]]), "planted", MODEL, suite, Told())
    assert "not kept for the next time" in answer_cache.save(tmp_path / "file" / "base.json", measured)
    assert answer_cache.save(tmp_path / "folder" / "base.json", measured) == "", "the control"


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    """Answers are kept for the next time where all are answers."""
    suite, nan = suite_of(tmp_path, "", ""), float("nan")
    for name, values, kept in (("bad", [[-1.0, -2.0], [nan, -2.0]], False), ("good", [[-1.0, -2.0]] * 2, True)):
        measured = ask_all(PlantedEngine([*values]), "planted", MODEL, suite, Told())
        answer_cache.save(tmp_path / name, measured)
        assert (answer_cache.load(tmp_path / name, "planted") == measured) is kept, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "qa.jsonl", "qa.yaml"]


def test_models_that_are_called_alike() -> None:
    paths = [Path(f"evals/{name}.json") for name in ("a", "b", "a", "a")]
    assert [path.name for path in distinct(paths)] == ["a.json", "b.json", "a-2.json", "a-3.json"]


def test_two_that_write_one_file(tmp_path: Path) -> None:
    """Two evaluations of one base at the same time: each file is one of both, and nothing else is left."""
    suite = suite_of(tmp_path, "")
    start = FORK.Barrier(3)

    def write(number: int) -> None:
        measured = ask_all(PlantedEngine([[-1.0, -2.0]]), f"planted {number}" * 1000, MODEL, suite, Told())
        start.wait()
        for _ in range(50):
            answer_cache.save(tmp_path / "cached" / "base.json", measured)

    children = [FORK.Process(target=write, args=(number,)) for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    known = answer_cache.load(tmp_path / "cached" / "base.json", "base")
    assert known and known.engine in [f"planted {number}" * 1000 for number in range(3)]
    assert [path.name for path in (tmp_path / "cached").iterdir()] == ["base.json"]


def test_tasks_that_are_written_alike_have_a_figure_each(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "a b", "a-b", "", "other", "a b")
    names = metric_names(suite)
    assert set(names.values()) == {None, "a b", "a-b", "", "other"} and len(names) == 5
    assert list(names)[:2] == ["acc", "acc-a-b"]
    assert list(metric_names(suite_of(tmp_path, "été", "ete", "日本"))) == ["acc", "acc-ete", "acc-ete-2", "acc-other"]


def test_figures_of_tasks_have_names_that_records_take() -> None:
    """Or what was written could not be read again: ``pass@1`` of humaneval."""
    names = {**figure_names({"humaneval": "pass@1"}), **figure_names({"a.b": "acc", "_c": "pass@1"})}
    assert names == {"pass_1": None, "score": None, "acc-a_b": "a.b", "pass_1-_c": "_c"}
    suite = HarnessOptions(("_a", "b+c")).name
    assert suite == "a-b_c" and all(NAME.fullmatch(name) for name in (*names, suite))
