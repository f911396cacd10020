"""front.json: all that a sweep did, the front, and what it recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.sweeping.constraint_choice import CONSTRAINTS, Constraint, ConstraintChoice, choose
from lora2serve.sweeping.data_likeness import DataFigures
from lora2serve.sweeping.explored import Explored, explored
from lora2serve.sweeping.finalists import Finalist, finalists, judged_by_final_rows
from lora2serve.sweeping.optuna_points import importances
from lora2serve.sweeping.rank_steps import LossChange, RankStep, loss_change
from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_space import SearchPoint
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_quality import Quality
from lora2serve.sweeping.trial_record import FULL, Objectives, Status


@dataclass(frozen=True)
class TrialLine(JsonRecord):
    """One trial. ``share`` of the search's steps; ``objectives`` as they are compared within its level."""

    WHOLE: ClassVar[bool] = True

    key: str
    words: str
    settings: Mapping[str, object]
    level: int  # -1 for the last phase
    share: float
    seed: int
    status: Status
    problem: str
    objectives: Objectives | None
    on_front: bool
    memory_measured: bool
    wall: float
    run: str
    host: str
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class FinalLine(JsonRecord):
    """One point of the front with all rows and steps; ``change``: from the best one's loss."""

    WHOLE: ClassVar[bool] = True

    words: str
    settings: Mapping[str, object]
    objectives: Objectives
    by_seed: tuple[float, ...]
    change: LossChange | None
    run: str


@dataclass(frozen=True)
class ChoiceLine(JsonRecord):
    """What to take where ``constraint`` is scarce."""

    WHOLE: ClassVar[bool] = True

    constraint: Constraint
    words: str
    settings: Mapping[str, object]
    reason: tuple[str, ...]
    run: str


@dataclass(frozen=True)
class SweepReport(JsonRecord):
    """The whole file. ``recommended`` is the choice for ``constraint``."""

    WHOLE: ClassVar[bool] = True

    format: int
    name: str
    recipe: str
    constraint: Constraint
    margin: float
    rows: int
    all_rows: int
    search_rows: int
    final_rows: int
    base_loss: float  # on the rows of the search
    base_final_loss: float
    judged: bool  # whether the choices are by rows that no trial has seen
    recommended: ChoiceLine
    choices: tuple[ChoiceLine, ...]
    finals: tuple[FinalLine, ...]
    rank_steps: tuple[RankStep, ...]
    widened: tuple[float, ...]
    explored: Explored
    explored_words: str
    importance: Mapping[str, float]
    near: tuple[str, ...]
    figures: DataFigures  # of the held-out rows, by which a later sweep knows whether its data are like these
    trials: tuple[TrialLine, ...] = field(default=())
    quality: Quality = field(default_factory=Quality)  # what a loss is here: of a suite, what is missing of its scores
    base_eval_loss: float | None = None  # on the held-out rows of the search, where a suite judges


def report(plan: SearchPlan, facts: SweepFacts, constraint: Constraint) -> SweepReport:
    """Of a search in which a trial gave a loss."""
    ends, judged = finalists(plan), judged_by_final_rows(plan)
    base = facts.base_final.mean if judged else facts.settings.base_loss
    steps, margin = plan.rank_steps, facts.settings.margin
    choices = {name: _choice_line(choose(ends, name, base, margin, steps, facts.quality), plan) for name in CONSTRAINTS}
    look = explored(plan)
    first = [(spec.point, outcome.losses.mean) for spec, outcome in plan.finished_at(0)]
    return SweepReport(
        format=1, name=facts.name, recipe=facts.recipe_name, constraint=constraint, margin=margin, rows=facts.rows,
        all_rows=facts.all_rows, search_rows=facts.search_rows, final_rows=facts.final_rows,
        base_loss=facts.settings.base_loss, base_final_loss=facts.base_final.mean, judged=judged,
        recommended=choices[constraint], choices=tuple(choices.values()),
        finals=tuple(_final_line(finalist, ends[0], plan) for finalist in ends), rank_steps=tuple(steps),
        widened=plan.widened, explored=look, explored_words=look.words, importance=importances(first),
        near=facts.near, figures=facts.figures, trials=tuple(_trial_lines(plan)), quality=facts.quality,
        base_eval_loss=facts.base_eval.mean if facts.base_eval.sums else None,
    )  # fmt: skip


def settings_of_point(point: SearchPoint, plan: SearchPlan) -> dict[str, object]:
    """The fields of a recipe."""
    return point.overrides(plan.settings.alpha_per_rank)


def _choice_line(choice: ConstraintChoice, plan: SearchPlan) -> ChoiceLine:
    point = choice.finalist.point
    return ChoiceLine(
        choice.constraint, point.words, settings_of_point(point, plan), choice.reason, choice.finalist.run
    )


def _final_line(finalist: Finalist, best: Finalist, plan: SearchPlan) -> FinalLine:
    change = None if finalist is best else loss_change(best.losses, finalist.losses)
    settings = settings_of_point(finalist.point, plan)
    return FinalLine(finalist.point.words, settings, finalist.objectives, finalist.by_seed, change, finalist.run)


def _trial_lines(plan: SearchPlan) -> list[TrialLine]:
    front = set(plan.front)
    lines = []
    for key, outcome in plan.results.items():
        spec = plan.tried[key]
        searched = spec.level != FULL
        share = plan.settings.shares[spec.level] if searched else 1.0
        compared = plan.objectives(spec.point, spec.level) if searched and outcome.finished else outcome.objectives
        lines.append(
            TrialLine(
                key=key, words=spec.point.words, settings=settings_of_point(spec.point, plan), level=spec.level,
                share=share, seed=spec.seed, status=outcome.status, problem=outcome.problem,
                objectives=compared if outcome.finished else None,
                on_front=spec.level == plan.top_level and spec.point in front, memory_measured=outcome.memory_measured,
                wall=outcome.wall, run=outcome.run, host=outcome.host, curve=outcome.curve,
            )
        )  # fmt: skip
    return lines
