"""Gates: which texts are ones, and what they come to."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lora2serve.errors import UsageError
from lora2serve.evaluation.eval_records import ItemResult
from lora2serve.evaluation.score_gates import GateResult, judge, parse_gate, refuse_unknown
from lora2serve.evaluation.suite_evaluation import gate_results
from lora2serve.evaluation.suite_run import Measured

FIGURES = {"acc": ("score", None), "acc-geo": ("score", "geo"), "seconds": ("seconds", None)}


def measured(scores: list[int], seconds: float = 1.0, name: str = "new") -> Measured:
    items = [
        ItemResult(str(n), "", "", float(score), seconds + n / 1000, task="geo" if n % 2 else "")
        for n, score in enumerate(scores)
    ]
    return Measured(name, "engine", tuple(items))


def verdict(text: str, new: list[int], old: list[int] | None = None, **times: float) -> str:
    gate = parse_gate(text)
    metric, task = FIGURES[gate.metric]
    other = measured(old, times.get("before", 1.0), "old").vector(metric, task) if old is not None else None
    return judge(gate, "new", measured(new, times.get("after", 1.0)).vector(metric, task), other, None).verdict


def test_gates() -> None:
    assert verdict("acc >= 0.9", [1] * 100) == "met" and verdict("acc >= 0.9", [1] * 60 + [0] * 40) == "missed"
    assert verdict("acc >= 0.9", [1] * 9 + [0]) == "not enough items"
    assert verdict("acc >= base - 0.05", [1] * 200, [1] * 200) == "met"
    assert verdict("acc >= base - 0.01", [1] * 20, [1] * 20) == "not enough items", "twenty do not show that"
    assert verdict("acc >= base - 0.05", [0] * 60 + [1] * 140, [1] * 200) == "missed"
    assert verdict("acc-geo >= 0.9", [n % 2 for n in range(200)]) == "met" != verdict("acc >= 0.9", [0, 1] * 100)
    assert verdict("seconds <= base + 0.1", [1] * 50, [1] * 50, after=1.05) == "met"
    assert verdict("seconds <= base + 0.1", [1] * 50, [1] * 50, after=1.5) == "missed"
    assert verdict("seconds <= 2", [1] * 50) == "met"


def test_what_was_not_answered_or_not_measured_meets_no_gate() -> None:
    """An engine's errors are neither a fast answer nor a base that is easily beaten; numbers that are none are none."""
    new, old = measured([1] * 100), measured([1] * 100, name="old")
    broken = replace(old, items=(*old.items[:99], replace(old.items[99], score=0.0, seconds=0.0, error="it ended")))

    def verdicts(models: list[Measured], reference: Measured, *texts: str) -> list[str]:
        results = gate_results([parse_gate(text) for text in texts], [*models, reference], -1, FIGURES)
        return [result.verdict for result in results]

    texts = ("acc >= base - 0.05", "seconds <= base + 0.5", "acc >= 0.9")
    assert verdicts([new], old, *texts) == ["met"] * 3, "the control"
    assert verdicts([new], broken, *texts) == ["not enough items", "not enough items", "met"]
    assert verdicts([broken], old, "seconds <= 2", "acc >= 0.9") == ["not enough items", "met"]
    nothing = judge(parse_gate("acc >= base - 0.05"), "new", [1.0, float("nan")] * 50, [1.0] * 100, None)
    assert nothing.verdict == "not enough items" and "not measured on every item" in nothing.reason


def test_the_first_of_several_has_gates_of_its_own() -> None:
    """What each must reach by itself, that one must, too; it is not compared with itself."""
    bad, good = measured([0] * 100, name="bad"), measured([1] * 100, name="good")
    gates = [parse_gate("acc >= 0.9"), parse_gate("acc >= base - 0.05")]
    found = [(result.subject, result.verdict) for result in gate_results(gates, [bad, good], 0, FIGURES)]
    assert found == [("bad", "missed"), ("good", "met"), ("good", "met")]


def test_a_reason_says_how_many_are_needed() -> None:
    result = judge(parse_gate("acc >= base - 0.01"), "new", [1.0] * 20, [1.0] * 20, None)
    assert "20 items are not enough, about 268 would be" in result.reason and not result.met
    enough = judge(parse_gate("acc >= base - 0.01"), "new", [1.0] * 268, [1.0] * 268, None)
    fewer = judge(parse_gate("acc >= base - 0.01"), "new", [1.0] * 267, [1.0] * 267, None)
    assert enough.met and not fewer.met, "that many are, if none changes"
    changed = judge(parse_gate("acc >= base - 0.01"), "new", [1.0] * 19 + [0.0], [1.0] * 20, None)
    assert "about" in changed.reason and "268" not in changed.reason


@pytest.mark.parametrize(
    ("text", "right", "count"), [("acc >= 0.98", 100, 120), ("acc >= 0.8", 90, 30), ("changed <= 0.3", 20, 20)]
)
def test_a_bound_says_how_many_are_needed(text: str, right: int, count: int) -> None:
    """With the same share of right ones; where that is not beyond the bound, no number is."""

    def judged(items: int) -> GateResult:
        scores = [1.0] * round(items * right / 100) + [0.0] * (items - round(items * right / 100))
        return judge(parse_gate(text), "new", scores, None, None)

    found = re.search(r"items are not enough, about ([\d,]+) like these would be$", judged(count).reason)
    assert found and judged(count).verdict == "not enough items", judged(count)
    needed = int(found[1])
    assert judged(-(-needed // 10) * 10).met and not judged(needed // 10 * 10 - 10).met
    assert judge(parse_gate("acc >= 0.98"), "new", [1.0] * 97 + [0.0] * 3, None, None).reason.endswith("not enough")
    assert judge(parse_gate("f1 >= 0.5"), "new", [0.4, 0.7] * 6, None, None).reason.endswith("not enough"), "no share"


def test_items_of_one_group_have_a_reason() -> None:
    """Nothing follows from one document, and nobody can say how many items would be enough."""
    one, few = ["a"] * 100, [str(n % 8) for n in range(100)]
    for groups in (one, few):
        for text in ("acc >= base - 0.05", "acc >= 0.9"):
            result = judge(parse_gate(text), "new", [1.0] * 100, [1.0] * 100, groups)
            assert result.verdict == "not enough items" and "in too few groups for an interval" in result.reason
    less = judge(parse_gate("acc >= base - 0.05"), "new", [1.0] * 9, [1.0] * 9, ["a"] * 9)
    assert "more groups may be" in less.reason
    many = judge(parse_gate("acc >= base - 0.05"), "new", [1.0] * 100, [1.0] * 100, [str(n) for n in range(100)])
    assert many.verdict == "met", "the control"


def test_what_is_no_gate() -> None:
    for text in ("acc", "acc > 0.5", "acc >= base - x", "acc >= base + 0.1", "seconds <= base - 1", "acc >= champion"):
        with pytest.raises(UsageError, match="--gate"):
            parse_gate(text)
    gate = parse_gate(" qa.acc>=base-0.01 ")
    assert (gate.suite, gate.metric, gate.margin, gate.higher_is_better) == ("qa", "acc", 0.01, True)
    refuse_unknown([gate], "qa", ["acc"], compared=True)
    with pytest.raises(UsageError, match="the suite is other"):
        refuse_unknown([gate], "other", ["acc"], compared=True)
    with pytest.raises(UsageError, match="no figure acc"):
        refuse_unknown([gate], "qa", ["f1"], compared=True)
    for text in ("acc >= 70", "acc >= base - 1", "acc-geo <= 50", "acc >= base - 5"):
        with pytest.raises(UsageError, match="is from 0 to 1, and a point"):
            refuse_unknown([parse_gate(text)], "qa", ["acc", "acc-geo"], compared=True)
    for metric in ("acc_norm", "prompt_level_strict_acc", "pass@1"):
        with pytest.raises(UsageError, match="is from 0 to 1, and a point"):
            refuse_unknown([parse_gate(f"{metric} >= base - 5")], "qa", [metric], compared=True)
    refuse_unknown([parse_gate("acc >= 1"), parse_gate("seconds <= 90")], "qa", ["acc", "seconds"], compared=True)
    with pytest.raises(UsageError, match="nothing to compare with"):
        refuse_unknown([gate], "qa", ["acc"], compared=False)
