"""Two models on the same prompts: in what their answers differ, beyond that in which one differs from itself.

The first model is asked twice before the second: what changes between these two is the floor of everything that has no
truth, such as the share of changed answers. It is not zero where an engine answers in batches, or by chance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora2serve.artifacts.suite_scores import SuiteFigure
from lora2serve.evaluation import eval_report, stats
from lora2serve.evaluation.eval_records import ItemResult, SuiteEvaluation
from lora2serve.evaluation.eval_report import EvalReport, FigureDifference, Finding
from lora2serve.evaluation.score_gates import GateResult, ScoreGate, judge
from lora2serve.evaluation.scorers import parsed_json
from lora2serve.evaluation.suite import Suite, SuiteItem
from lora2serve.evaluation.suite_run import EngineHost, Measured, evaluation, measure, metric_names
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.parity_check.metrics import lumped_kl
from lora2serve.progress import Progress

AGAIN = ", again"  # behind the name of the first model, asked a second time
REFUSAL = re.compile(
    r"^\W*(?:i(?:['’]?m| am) (?:(?:so |very )?sorry|unable|not able)|sorry,|i can(?:no|['’]|\s?no)t|"
    r"i won['’]t|as an ai\b)",
    re.IGNORECASE,
)
BEYOND_FLOOR = ("changed", "kl")  # of an answer beside the first model's, whose floor is not zero
TIMES = ("seconds", "first_seconds")
LOWER_IS_BETTER = ("changed", "kl", "seconds", "first_seconds")
BETTER_KNOWN = ("json", "seconds", "first_seconds")  # of the others a difference is just that
MARGINS = {"kl": 0.01, "length": 0.05, "seconds": 0.05, "first_seconds": 0.05}  # nats, and logarithms of a factor


@dataclass(frozen=True)
class Compared:
    """The first model, the same again, and the second."""

    measured: tuple[Measured, Measured, Measured]
    evaluations: tuple[SuiteEvaluation, ...]
    report: EvalReport


@dataclass(frozen=True)
class Pair:
    """One figure on each item: of the first model or of the floor, and of the second.

    ``unanswered``: of whom nothing is known on some items, in words. Two that fail on the same ones agree in nothing.
    """

    old: Sequence[float]
    new: Sequence[float]
    groups: stats.Groups | None
    unanswered: str = ""


def compare_models(
    first: ChatModel, second: ChatModel, suite: Suite, gates: Sequence[ScoreGate], progress: Progress
) -> Compared:
    """Ask the first, the first again, and the second."""
    with EngineHost(progress) as host:
        old = measure(host, first, suite, progress, first_tokens=True)
        again = measure(host, replace(first, name=f"{first.name}{AGAIN}", note=""), suite, progress, first_tokens=True)
        new = measure(host, second, suite, progress, first_tokens=True)
    measured = (old, again, new)
    pairs = {**score_pairs(old, new, suite), **behavior_pairs(old, again, new)}
    floors = {name: _shift(_BEHAVIORS[name](old), _BEHAVIORS[name](again)) for name in TIMES}
    evaluations = tuple(evaluation(item, suite) for item in measured)
    rows = [
        eval_report.subject_row(item, record, "", cached=False)
        for item, record in zip(measured, evaluations, strict=True)
    ]
    rows = [replace(row, figures={**row.figures, **_shares(m, old)}) for row, m in zip(rows, measured, strict=True)]
    report = EvalReport(
        command="compare", suite=suite.name, suite_sha256=suite.sha256, items=len(suite.items),
        scorer=suite.scorer.kind if any(map(suite.has_truth, suite.items)) else "",
        created=evaluations[0].created, versions=evaluations[0].versions,
        subjects=tuple(rows), differences=tuple(differences(old.name, new.name, pairs, floors)),
        changes=tuple(eval_report.changes(new, old) or changed_answers(new, old)), notes=suite.notes,
        gates=tuple(gate_result(gate, new.name, {**pairs, **_plain_times(old, new)}) for gate in gates),
    )  # fmt: skip
    return Compared(measured, evaluations, report)


def compared_figures(suite: Suite) -> dict[str, Sequence[SuiteItem]]:
    """What a gate may name, and the items that it is of."""
    known = suite.with_truth()
    scores = {name: known.of_task(task) for name, task in metric_names(known).items()} if known else {}
    return {**scores, **dict.fromkeys((*_BEHAVIORS, *BEYOND_FLOOR), suite.items)}


def score_pairs(old: Measured, new: Measured, suite: Suite) -> dict[str, Pair]:
    """Scores of the items that have a truth."""
    known = suite.with_truth()
    if known is None:
        return {}
    before, after = old.of(known), new.of(known)
    return {
        name: Pair(
            before.vector("score", task), after.vector("score", task), after.groups(task), _unanswered([before], task)
        )
        for name, task in metric_names(known).items()
    }


def behavior_pairs(old: Measured, again: Measured, new: Measured) -> dict[str, Pair]:
    """What needs no truth; a figure that not every item has is left out."""
    pairs = {
        "changed": (_changed(old, again), _changed(old, new)),
        "kl": (_kl(old, again), _kl(old, new)),
        **{name: (of(old), of(new)) for name, of in _BEHAVIORS.items()},
    }
    if not any(pairs["json"][0]) and not any(pairs["json"][1]):
        del pairs["json"]  # nobody asked for any
    finite = {
        name: both for name, both in pairs.items() if all(np.isfinite(values).all() and len(values) for values in both)
    }
    unanswered = _unanswered([old, again, new])
    return {name: Pair(before, after, new.groups(), unanswered) for name, (before, after) in finite.items()}


def changed_answers(new: Measured, old: Measured) -> list[eval_report.ItemChange]:
    """The items that are answered otherwise, where no score says which answer is better."""
    changed = [
        eval_report.item_change(new, old, before, after, won=None)
        for before, after in zip(old.items, new.items, strict=True)
        if before.answer != after.answer
    ]
    return changed[: eval_report.MOST_CHANGES]


def first_token_kl(reference: Mapping[str, float], other: Mapping[str, float]) -> float:
    """In nats, at least: of the tokens that both show, all others being one; NaN where an engine shows none.

    Those that the second does not show are less likely there than the least that it shows: two that have no token in
    common are far apart.
    """
    if not reference or not other:
        return math.nan
    both = [token for token in reference if token in other]
    p, q = [reference[token] for token in both], [other[token] for token in both]
    alone = sum(math.exp(value) for token, value in reference.items() if token not in other)
    if alone:
        left = max(1 - sum(map(math.exp, other.values())), 1e-9)
        most = min((len(reference) - len(both)) * math.exp(min(other.values())), left)
        rest_p, rest_q = 1 - sum(map(math.exp, p)), 1 - sum(map(math.exp, q))
        p.append(math.log(alone))
        q.append(math.log(max(min(most, rest_q * alone / max(rest_p, alone)), 1e-12)))
    return lumped_kl(np.array(p), np.array(q))


def differences(
    first: str, second: str, pairs: Mapping[str, Pair], floors: Mapping[str, float]
) -> list[FigureDifference]:
    """``floors``: by how much the first differs from itself in times, for which a busy machine is enough."""
    paired = {
        name: stats.paired(
            pair.old, pair.new, pair.groups, higher_is_better=name.partition("-")[0] not in LOWER_IS_BETTER
        )
        for name, pair in pairs.items()
    }
    adjusted = stats.holm([difference.p for difference in paired.values()])
    found = []
    for (name, difference), p in zip(paired.items(), adjusted, strict=True):
        verdict: Finding = difference.verdict(MARGINS.get(name, stats.MARGIN), p)
        floor = abs(floors.get(name, 0.0))
        if verdict in ("better", "worse") and difference.low <= floor and difference.high >= -floor and floor:
            verdict = "no difference"
        behavior = _is_behavior(name)
        if behavior and name not in BETTER_KNOWN and verdict in ("better", "worse"):
            verdict = "different"
        found.append(FigureDifference(second, first, name, difference, p, verdict, "behavior" if behavior else "score"))
    return found


def gate_result(gate: ScoreGate, subject: str, pairs: Mapping[str, Pair]) -> GateResult:
    """What one gate comes to. A score that is missing is 0, and so no easy win but where the first one's is."""
    pair = pairs.get(gate.metric)
    if pair is None:
        return GateResult(gate.text, subject, "not enough items", f"{gate.metric} was not measured in these engines")
    if pair.unanswered and (gate.margin is not None or _is_behavior(gate.metric)):
        return GateResult(gate.text, subject, "not enough items", f"{pair.unanswered}: nothing is known of them")
    return judge(gate, subject, pair.new, pair.old, pair.groups)


def _is_behavior(name: str) -> bool:
    return name in _BEHAVIORS or name in BEYOND_FLOOR


def _unanswered(models: Sequence[Measured], task: str | None = None) -> str:
    failed = {model.name: count for model in models if (count := model.failed(task))}
    return ", ".join(f"{count} items were not answered by {name}" for name, count in failed.items())


def _plain_times(old: Measured, new: Measured) -> dict[str, Pair]:
    """A gate names seconds, not their logarithms."""
    times = {name: Pair(old.vector(name), new.vector(name), new.groups()) for name in ("seconds", "first_seconds")}
    return {name: pair for name, pair in times.items() if np.isfinite([*pair.old, *pair.new]).all()}


def _shares(measured: Measured, first: Measured) -> dict[str, SuiteFigure]:
    """What the table shows of one of the three beside its scores."""
    figures = {}
    shares = {"refusals": _refusals(measured)}
    if measured is not first:
        shares = {"changed": _changed(first, measured), **shares}
    for name, values in shares.items():
        estimate = stats.mean(values, measured.groups())
        low, high = (end if math.isfinite(end) else None for end in (estimate.low, estimate.high))
        figures[name] = SuiteFigure(value=estimate.value, low=low, high=high, n=len(values), higher_is_better=False)
    return figures


def _shift(old: Sequence[float], new: Sequence[float]) -> float:
    apart = np.subtract(new, old)
    return float(apart.mean()) if np.isfinite(apart).all() else 0.0


def _changed(old: Measured, new: Measured) -> list[float]:
    return [float(a.answer != b.answer) for a, b in zip(old.items, new.items, strict=True)]


def _kl(old: Measured, new: Measured) -> list[float]:
    return [first_token_kl(a.first_tokens, b.first_tokens) for a, b in zip(old.items, new.items, strict=True)]


def _refusals(measured: Measured) -> list[float]:
    return [float(bool(REFUSAL.match(item.answer))) for item in measured.items]


def _json(measured: Measured) -> list[float]:
    values = [parsed_json(item.answer) for item in measured.items]
    return [float(value is not None and isinstance(value[0], dict | list)) for value in values]


def _logarithms(of: Callable[[ItemResult], float | None]) -> Callable[[Measured], list[float]]:
    """A mean of logarithms is a factor, and one slow item does not decide it."""

    def values(measured: Measured) -> list[float]:
        figures = [of(item) for item in measured.items]
        return [math.log(figure) if figure else math.nan for figure in figures]

    return values


_BEHAVIORS: Mapping[str, Callable[[Measured], list[float]]] = {
    "length": _logarithms(lambda item: len(item.answer) + 1),
    "refusals": _refusals,
    "json": _json,
    "seconds": _logarithms(lambda item: item.seconds),
    "first_seconds": _logarithms(lambda item: item.first_seconds),
}
