"""The points of the last phase, by what all their seeds reached on rows that no trial has seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_space import SearchPoint
from lora2serve.sweeping.trial_record import FULL, Objectives, RowLoss, TrialOutcome, TrialSpec


@dataclass(frozen=True)
class Finalist:
    """``losses`` are means over the seeds; ``run`` is that of the recipe's own seed."""

    point: SearchPoint
    losses: RowLoss
    by_seed: tuple[float, ...]
    objectives: Objectives
    run: str


def finalists(plan: SearchPlan) -> list[Finalist]:
    """The best first, of equal ones the smallest. Without a trial of the last phase, the front by the search."""
    judged = [_judged(plan, point) for point in plan.finalists]
    chosen = [finalist for finalist in judged if finalist] or [_searched(plan, point) for point in plan.front]
    return sorted(chosen, key=lambda finalist: (finalist.losses.mean, finalist.objectives.parameters))


def judged_by_final_rows(plan: SearchPlan) -> bool:
    """Whether any trial of the last phase gave a loss."""
    return any(_judged(plan, point) for point in plan.finalists)


def _judged(plan: SearchPlan, point: SearchPoint) -> Finalist | None:
    keys = [TrialSpec(point, FULL, seed).key for seed in plan.settings.seeds]
    outcomes = [outcome for key in keys if (outcome := plan.results.get(key)) and outcome.finished]
    if not outcomes:
        return None
    losses = _mean_of(outcomes)
    memory, seconds = max(outcome.memory for outcome in outcomes), min(outcome.seconds for outcome in outcomes)
    objectives = replace(outcomes[0].objectives, loss=losses.mean, memory=memory, seconds=seconds)
    return Finalist(point, losses, tuple(o.losses.mean for o in outcomes), objectives, outcomes[0].run)


def _searched(plan: SearchPlan, point: SearchPoint) -> Finalist:
    outcome = plan.results[plan.spec(point, plan.top_level).key]
    return Finalist(point, outcome.losses, (outcome.losses.mean,), plan.objectives(point), outcome.run)


def _mean_of(outcomes: list[TrialOutcome]) -> RowLoss:
    """Of each row over the seeds."""
    sums = [outcome.losses.sums for outcome in outcomes]
    total = reduce(lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), sums)
    return replace(outcomes[0].losses, sums=tuple(value / len(outcomes) for value in total))
