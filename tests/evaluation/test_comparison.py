"""Two models beside one that is asked twice, on answers whose difference is planted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora2serve.errors import DataError
from lora2serve.evaluation.comparison import (
    REFUSAL,
    behavior_pairs,
    changed_answers,
    differences,
    first_token_kl,
    gate_result,
    score_pairs,
)
from lora2serve.evaluation.eval_records import ItemResult
from lora2serve.evaluation.score_gates import parse_gate
from lora2serve.evaluation.suite import read_suite
from lora2serve.evaluation.suite_run import Measured, evaluation
from lora2serve.parity_check import metrics
from tests.evaluation.test_suite import written

COUNT = 200
SURE = {"a": math.log(0.9), "b": math.log(0.05), "c": math.log(0.01)}


def answers(name: str, *, changed: float = 0.0, slower: float = 1.0, seed: int = 0, text: str = "yes") -> Measured:
    """A share of the answers are not those of others; seconds vary as they do."""
    rng = np.random.default_rng(seed)
    other = rng.uniform(size=COUNT) < changed
    seconds = 0.5 * slower * np.exp(0.1 * rng.standard_normal(COUNT))
    items = [
        ItemResult(str(n), "", f"{text} {n}" if not other[n] else f"no, it is not {n}", 0.0, float(seconds[n]),
                   float(seconds[n] / 3), 5, "stop", first_tokens=SURE)
        for n in range(COUNT)
    ]  # fmt: skip
    return Measured(name, "engine", tuple(items))


def verdicts(old: Measured, again: Measured, new: Measured) -> dict[str, str]:
    floor = float(np.mean(np.log(again.vector("seconds"))) - np.mean(np.log(old.vector("seconds"))))
    floors = {"seconds": floor, "first_seconds": floor}
    return {item.metric: item.verdict for item in differences("a", "b", behavior_pairs(old, again, new), floors)}


@pytest.mark.parametrize("draws", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_model_beside_itself(draws: int) -> None:
    """In all draws, with a floor of 3 % that batches make."""
    for seed in range(draws):
        old, again, new = (answers(name, changed=0.03, seed=3 * seed + n) for n, name in enumerate("abc"))
        assert not {"better", "worse", "different"} & set(verdicts(old, again, new).values()), seed


def test_what_is_planted_is_found() -> None:
    old, again = answers("a"), answers("a again", changed=0.03, seed=1)
    found = verdicts(old, again, answers("b", changed=0.3, slower=1.5, seed=2))
    assert found["changed"] == "different" and found["seconds"] == found["first_seconds"] == "worse"
    assert found["kl"] == "no difference" and "json" not in found, "nobody answers in JSON"
    assert verdicts(old, again, answers("b", changed=0.03, seed=2))["changed"] != "different", "the control: the floor"
    assert verdicts(old, answers("a again", slower=1.6, seed=1), answers("b", slower=1.5, seed=2))["seconds"] == (
        "no difference"
    ), "the machine was busy"
    refusing = answers("b", text="I'm sorry, but I cannot say that to number")
    found = verdicts(old, again, refusing)
    assert found["refusals"] == found["length"] == "different"


def test_valid_json() -> None:
    old, new = answers("a", text='{"n":'), answers("b", text='{"n":')
    whole = replace(old, items=tuple(replace(item, answer='{"n": 1}') for item in old.items))
    assert "json" not in verdicts(old, old, new)
    assert verdicts(whole, whole, new)["json"] == "worse"


@pytest.mark.parametrize(
    "text", ["I'm sorry, but", "I’m unable to", "I cannot help", "I can't do", "As an AI, I", "**Sorry, no"]
)
def test_refusals(text: str) -> None:
    assert REFUSAL.match(text) and not REFUSAL.match(f"He said: {text}") and not REFUSAL.match("I can do that")


def test_kl_of_first_tokens() -> None:
    """At most that of the whole distributions."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 50)) * 3
    p, q = metrics.log_softmax(logits)
    whole = float((np.exp(p) * (p - q)).sum())
    of = [{str(n): float(values[n]) for n in np.argsort(-values)[:20]} for values in (p, q)]
    assert 0 < first_token_kl(*of) <= whole and first_token_kl(of[0], of[0]) == pytest.approx(0, abs=1e-12)
    for scale in (1, 3, 10):  # from flat to sure of themselves
        logits = metrics.log_softmax(rng.standard_normal((40, 50)) * scale)
        for mine, other in zip(logits[::2], logits[1::2], strict=True):
            few = [{str(n): float(values[n]) for n in np.argsort(-values)[:8]} for values in (mine, other)]
            assert 0 <= first_token_kl(*few) <= float((np.exp(mine) * (mine - other)).sum()) + 1e-9
    these, those = ({name: math.log(0.45) for name in names} for names in (("a", "b"), ("c", "d")))
    assert first_token_kl(these, those) > 1 > first_token_kl(these, these) == pytest.approx(0, abs=1e-12)
    everything = [{str(n): float(values[n]) for n in range(50)} for values in (p, q)]
    assert first_token_kl(*everything) == pytest.approx(whole, rel=1e-6)
    assert math.isnan(first_token_kl({}, of[0]))
    silent = replace(answers("b"), items=tuple(replace(item, first_tokens={}) for item in answers("b").items))
    assert "kl" not in verdicts(answers("a"), answers("a"), silent), "an engine that shows none has no KL"


def test_prompts_without_truth(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Alone?"}, {"messages": [{"role": "user", "content": "Turns?"}]},
        {"request_id": "r1", "arm": "champion", "prompt": "Captured?", "answer": "not a truth"},
        {"request_id": "r2", "arm": "champion", "prompt": None}, {"prompt": "Known?", "expected": "yes"},
    ]  # fmt: skip
    path = written(tmp_path, rows)
    suite = read_suite(path, truth=False)
    assert [item.question for item in suite.items] == ["Alone?", "Turns?", "Captured?", "Known?"]
    assert [suite.has_truth(item) for item in suite.items] == [False, False, False, True]
    assert suite.items[2].name == "r1-champion" and "1 rows left out: captured without their text" in suite.notes[0]
    with pytest.raises(DataError):
        read_suite(path)
    items = [ItemResult(item.name, "", "yes", float(item.name == "5"), 1.0) for item in suite.items]
    right = Measured("a", "", tuple(items))
    wrong = replace(right, items=tuple(replace(item, answer="no", score=0.0) for item in items))
    (pair,) = score_pairs(wrong, right, suite).values()
    assert (pair.old, pair.new) == ([0.0], [1.0]), "of what can be scored alone"
    scored = evaluation(right, suite).metrics
    assert (scored["acc"].value, scored["acc"].n, scored["seconds"].n) == (1.0, 1, 4)
    nothing = replace(suite, items=suite.items[:3])
    assert list(evaluation(right.of(nothing), nothing).metrics) == ["seconds"], "no accuracy of what has no truth"
    assert len(changed_answers(right, wrong)) == 4 and changed_answers(right, right) == []
    assert json.dumps(changed_answers(right, wrong)[0].to_json())


def test_what_was_not_answered_meets_no_gate(tmp_path: Path) -> None:
    """Two that fail on the same items do not agree on them, and a first that fails is not easily beaten."""
    suite = read_suite(written(tmp_path, [{"prompt": f"{n}?", "expected": f"yes {n}"} for n in range(1, COUNT + 1)]))
    old = Measured("a", "engine", tuple(replace(item, id=q.name, score=1.0) for item, q in zip(
        answers("a").items, suite.items, strict=True)))  # fmt: skip
    failed = replace(old, items=(*old.items[:100], *(
        replace(item, answer="", score=0.0, error="too long") for item in old.items[100:])))  # fmt: skip

    def verdicts(first: Measured, second: Measured, *texts: str) -> list[str]:
        pairs = {**score_pairs(first, second, suite), **behavior_pairs(first, first, second)}
        return [gate_result(parse_gate(text), "b", pairs).verdict for text in texts]

    texts = ("changed <= 0.05", "refusals <= 0.05", "acc >= other - 0.05", "acc >= 0.9")
    assert verdicts(old, old, *texts) == ["met"] * 4, "the control"
    assert verdicts(failed, failed, *texts) == [*["not enough items"] * 3, "missed"]
    assert verdicts(failed, old, *texts[2:]) == ["not enough items", "met"]
    assert verdicts(old, failed, *texts[2:]) == ["missed"] * 2
