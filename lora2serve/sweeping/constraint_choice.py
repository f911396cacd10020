"""Which point to take, for what is scarce: memory, time or quality; and why, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lora2serve.console import size, upper_first
from lora2serve.sweeping.finalists import Finalist
from lora2serve.sweeping.rank_steps import LossChange, RankStep, loss_change
from lora2serve.sweeping.search_plan import KEPT_GAIN
from lora2serve.sweeping.sweep_quality import EVAL_LOSS, Quality

Constraint = Literal["quality", "memory", "time"]
SAME_TIME = 1.05  # times within that are one: what else a machine does changes them as much
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)


@dataclass(frozen=True)
class ConstraintChoice:
    """The finalist for one constraint; ``reason`` is made of whole sentences."""

    constraint: Constraint
    finalist: Finalist
    reason: tuple[str, ...]


def choose(
    finalists: Sequence[Finalist], constraint: Constraint, base_loss: float, margin: float, steps: Sequence[RankStep],
    quality: Quality = EVAL_LOSS,
) -> ConstraintChoice:  # fmt: skip
    """Of ``finalists``, the best of which comes first.

    quality: the fewest parameters among those whose loss is shown to be within ``margin`` of the smallest one.
    memory, time: the least of it (of equal ones, the fewest parameters) among those that keep most of the best one's
        gain over the base.
    """
    best = finalists[0]
    if constraint == "quality":
        changes = {f.point: loss_change(best.losses, f.losses) for f in finalists[1:]}
        equal = [best, *(f for f in finalists[1:] if changes[f.point].no_worse(margin))]
        chosen = min(equal, key=lambda f: (f.objectives.parameters, f.objectives.memory, f.objectives.loss))
        why = _quality(chosen, best, changes.get(chosen.point), margin, len(finalists), quality)
    else:
        whole = base_loss - best.losses.mean
        keeping = [f for f in finalists if base_loss - f.losses.mean >= KEPT_GAIN * whole] or [best]
        least = min(_scarce(f, constraint) for f in keeping) * (SAME_TIME if constraint == "time" else 1.0)
        enough = [f for f in keeping if _scarce(f, constraint) <= least]
        chosen = min(enough, key=lambda f: (f.objectives.parameters, f.objectives.loss))
        why = _scarcity(chosen, best, constraint, base_loss, quality)
    lines = [step.words for step in steps if step.targets == chosen.point.targets]
    if best.losses.mean >= base_loss:
        lines.append("nothing that was trained is better than the base")
    return ConstraintChoice(
        constraint, chosen, (_figures(chosen, base_loss, quality), why, *(f"{upper_first(line)}." for line in lines))
    )


def _scarce(finalist: Finalist, constraint: Constraint) -> float:
    return finalist.objectives.memory if constraint == "memory" else finalist.objectives.seconds


def _figures(chosen: Finalist, base_loss: float, quality: Quality) -> str:
    count = len(chosen.by_seed)
    seeds = f" ({count} seeds: {quality.span(chosen.by_seed)})" if count > 1 else ""
    rows = quality.rows(len(chosen.losses.sums))
    return (
        f"{upper_first(chosen.point.words)} {quality.reached(chosen.losses.mean)}{seeds} on {rows}; the base "
        f"{'reaches' if quality.of_suite else 'has'} {quality.shown(base_loss)}."
    )


def _quality(
    chosen: Finalist, best: Finalist, change: LossChange | None, margin: float, count: int, quality: Quality
) -> str:
    within = quality.margin(margin)
    if change is not None:
        found = "changes on no item" if change.same else f"changes by {change.words}, which is within {within}"
        first = f"{upper_first(best.point.words)} has {quality.best}, {quality.shown(best.losses.mean)}"
        return (
            f"{first}: from it to this one it {found}, with {chosen.objectives.parameters:,} parameters "
            f"instead of {best.objectives.parameters:,}."
        )
    if count == 1:
        gain = f"{KEPT_GAIN:.0%} of its gain over the base"
        return f"It has {quality.best}, and no other point of the front keeps {gain}."
    return f"It has {quality.best} of {count}, and none with fewer parameters is shown to be within {within}."


def _scarcity(chosen: Finalist, best: Finalist, constraint: Constraint, base_loss: float, quality: Quality) -> str:
    what, shown = ("memory", size) if constraint == "memory" else ("time", _seconds)
    least = f"{'least' if constraint == 'memory' else 'shortest'}"
    own, other = _scarce(chosen, constraint), _scarce(best, constraint)
    whole = base_loss - best.losses.mean
    kept = (base_loss - chosen.losses.mean) / whole if whole > 0 else 1.0
    if chosen is best:
        return f"It has {quality.best}, and of what keeps {KEPT_GAIN:.0%} of its gain the {least} {what}: {shown(own)}."
    return (
        f"It keeps {kept:.0%} of the best one's gain over the base, and of those that keep {KEPT_GAIN:.0%} it takes "
        f"the {least} {what}: {shown(own)} instead of {shown(other)} of {best.point.words}."
    )


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.1f} h"
