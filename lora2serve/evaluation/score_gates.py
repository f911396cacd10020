"""Gates on scores: ``answers.acc >= base - 0.01``, ``acc >= 0.9``, ``seconds <= base + 0.5``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.errors import UsageError, did_you_mean
from lora2serve.evaluation import stats
from lora2serve.evaluation.stats import GateVerdict, Groups

EXAMPLE = "such as 'acc >= base - 0.01' or 'answers.acc >= 0.9'"
NUMBER = r"\d+(?:\.\d+)?|\.\d+"
RIGHT_OR_WRONG = ("acc", "exact_match", "changed", "refusals", "json")  # figures of items that have 0 or 1
SHARES = (*RIGHT_OR_WRONG, "f1", "judge", "score")  # figures from 0 to 1
NEARLY = 1e-9  # off a number: of a figure that may have any value, not only 0 and 1
GATE = re.compile(
    rf"\s*(?:(?P<suite>[\w-]+)\.)?(?P<metric>[\w@-]+)\s*(?P<sign>>=|<=)\s*"
    rf"(?:(?P<bound>{NUMBER})|(?P<other>base|other|against)(?:\s*(?P<margin_sign>[-+])\s*(?P<margin>{NUMBER}))?)\s*"
)


@dataclass(frozen=True)
class ScoreGate:
    """``bound`` is a number; or ``margin``, by how much it may be worse than the model that it is compared with."""

    text: str
    suite: str
    metric: str
    higher_is_better: bool
    bound: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class GateResult(JsonRecord):
    """What one gate came to, for one model, and why."""

    gate: str
    subject: str
    verdict: GateVerdict
    reason: str

    @property
    def met(self) -> bool:
        """Not enough items are no proof."""
        return self.verdict == "met"


@dataclass(frozen=True)
class ForeseenGate:
    """What one gate can come to, for one model, and why; "by a gain": two that are alike do not meet it."""

    gate: str
    subject: str
    can_be_met: Literal["yes", "by a gain", "no"]
    reason: str


def parse_gate(text: str) -> ScoreGate:
    """UsageError for what is no gate."""
    match = GATE.fullmatch(text)
    if match is None:
        raise UsageError(f"--gate {text!r}: expected METRIC >= NUMBER or METRIC >= base - MARGIN", EXAMPLE)
    higher = match["sign"] == ">="
    if match["bound"]:
        return ScoreGate(text.strip(), match["suite"] or "", match["metric"], higher, bound=float(match["bound"]))
    margin = float(match["margin"] or 0)
    if margin and (match["margin_sign"] == "-") != higher:
        raise UsageError(f"--gate {text!r}: this margin asks for more than the other has", EXAMPLE)
    return ScoreGate(text.strip(), match["suite"] or "", match["metric"], higher, margin=margin)


def refuse_unknown(gates: Sequence[ScoreGate], suite: str, metrics: Sequence[str], *, compared: bool) -> None:
    """UsageError for a gate that nothing here can meet, before a model is loaded."""
    for gate in gates:
        if gate.suite and gate.suite != suite:
            raise UsageError(f"--gate {gate.text!r}: the suite is {suite}", EXAMPLE)
        if _is_share(gate.metric) and ((gate.bound or 0) > 1 or (gate.margin or 0) >= 1):
            raise UsageError(f"--gate {gate.text!r}: {gate.metric} is from 0 to 1, and a point is 0.01", EXAMPLE)
        if gate.metric not in metrics:
            raise UsageError(
                f"--gate {gate.text!r}: no figure {gate.metric}{did_you_mean(gate.metric, metrics)}",
                f"there are {', '.join(metrics)}",
            )
        if gate.margin is not None and not compared:
            raise UsageError(f"--gate {gate.text!r}: nothing to compare with", "--against base, or any other model")


def _bounded(how: str, end: str) -> str:
    """One end of an interval in words; few groups have none."""
    return "in too few groups for an interval" if "inf" in end else f"{how} {end} with 95 % confidence"


def _is_share(metric: str) -> bool:
    return metric.partition("-")[0] in SHARES or _is_right_or_wrong(metric)


def _is_right_or_wrong(metric: str) -> bool:
    """Also of the harness's many: acc_norm, prompt_level_strict_acc, pass@1."""
    figure = metric.partition("-")[0]
    return figure in RIGHT_OR_WRONG or figure.startswith(("acc_", "exact_", "pass@")) or figure.endswith("_acc")


def foresee(gate: ScoreGate, subject: str, count: int, groups: Groups | None) -> ForeseenGate:
    """What a gate can come to with ``count`` items, whatever is answered to them."""
    best, worst = (1.0, 0.0) if gate.higher_is_better else (0.0, 1.0)
    if not _is_share(gate.metric):
        best = worst = (gate.bound or 1.0) * (1 + (NEARLY if gate.higher_is_better else -NEARLY))
    elif not _is_right_or_wrong(gate.metric):
        best = abs(best - NEARLY)
    result = judge(gate, subject, [best] * count, [best] * count, groups)
    alike, reason = "at best" if gate.margin is None else "if both are alike", result.reason
    if result.met:
        return ForeseenGate(gate.text, subject, "yes", f"{alike}: {reason}" if _is_share(gate.metric) else "")
    slack = abs(best - gate.bound) if gate.bound is not None else gate.margin
    if slack and groups is None and _is_right_or_wrong(gate.metric):
        reason = f"{count} items are not enough, {stats.fewest_items(slack):,} would be"
    gained = gate.margin is not None and judge(gate, subject, [best] * count, [worst] * count, groups).met
    return ForeseenGate(gate.text, subject, "by a gain" if gained else "no", f"{alike}: {reason}")


def judge(
    gate: ScoreGate, subject: str, scores: Sequence[float], old: Sequence[float] | None, groups: Groups | None
) -> GateResult:
    """``scores`` are what a model has of the gate's figure on each item, ``old`` those of the other one."""
    if not np.isfinite([*scores, *(old or ())]).all():
        return GateResult(gate.text, subject, "not enough items", f"{gate.metric} was not measured on every item")
    if gate.bound is not None:
        higher = gate.higher_is_better
        verdict = stats.gate_of_mean(scores, gate.bound, groups, higher_is_better=higher)
        estimate = stats.mean(scores, groups, level=stats.ONE_SIDED)
        end = estimate.low if higher else estimate.high
        reason = f"{estimate.value:.4g}, {_bounded('at least' if higher else 'at most', f'{end:.4g}')}"
        if verdict == "not enough items":
            reason = f"{reason}: {len(scores)} items are not enough"
            beyond = estimate.value > gate.bound if higher else estimate.value < gate.bound
            if beyond and groups is None and stats.is_binary(scores):
                reason = f"{reason}, about {stats.items_for_share(estimate.value, gate.bound):,} like these would be"
        return GateResult(gate.text, subject, verdict, reason)
    assert old is not None and gate.margin is not None
    difference = stats.paired(old, scores, groups, higher_is_better=gate.higher_is_better)
    verdict = difference.gate(gate.margin)
    end = difference.lower if gate.higher_is_better else difference.upper
    reason = f"differs by {difference.value:+.4g}, {_bounded('at worst', f'{end:+.4g}')}"
    if verdict == "not enough items":
        needed = "a margin is" if not gate.margin else "more groups may be"
        if gate.margin and math.isfinite(difference.smallest):
            needed = f"about {difference.items_needed(gate.margin):,} would be"
        reason = f"{reason}: {difference.items} items are not enough, {needed}"
    return GateResult(gate.text, subject, verdict, reason)
