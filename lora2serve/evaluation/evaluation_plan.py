"""What an evaluation would ask, of which engines, and what so many items can show, before an engine is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora2serve.evaluation.score_gates import ForeseenGate, ScoreGate, foresee
from lora2serve.evaluation.suite import Suite, SuiteItem
from lora2serve.evaluation.suite_evaluation import subjects_of
from lora2serve.evaluation.suite_run import group_names
from lora2serve.evaluation.task_rows import SCORER, TaskRows
from lora2serve.parity_check.installed_engines import EngineState

Command = Literal["evaluate", "compare"]
Items = Sequence[tuple[str, str]]  # the name of each, and its group


@dataclass(frozen=True)
class PlannedModel:
    """A model, and the engine that would answer for it.

    ``overlap``: what of the items it was trained on, in words, empty for none; ``note``: what the user should know of
    it; ``records``: the files of its scores, two where it would be asked twice.
    """

    name: str
    engine: EngineState
    overlap: str
    note: str
    records: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """What ``evaluate`` or ``compare`` would do.

    ``suite``: its name; ``source``: the file of its rows, empty for tasks of lm-evaluation-harness; ``scorer``: what
    scores an answer, empty where nothing is expected. ``items``: how many each model is asked; ``tasks``: how many of
    each task, empty without tasks. ``gates``: whether each can be met with so many items; ``notes``: what was left out
    of the suite; ``page``: the file that would show the report.
    """

    command: Command
    suite: str
    source: str
    scorer: str
    items: int
    tasks: Mapping[str, int]
    models: tuple[PlannedModel, ...]
    gates: tuple[ForeseenGate, ...]
    notes: tuple[str, ...]
    page: str


def plan_of_suite(
    command: Command, suite: Suite, models: Sequence[PlannedModel], gates: tuple[ForeseenGate, ...], page: Path
) -> EvaluationPlan:
    """``suite`` put to the models."""
    tasks = dict(Counter(item.task for item in suite.items if item.task))
    scorer = suite.scorer.kind if any(map(suite.has_truth, suite.items)) else ""
    return EvaluationPlan(
        command, suite.name, suite.source, scorer, len(suite.items), tasks, tuple(models), gates, suite.notes, str(page)
    )  # fmt: skip


def plan_of_tasks(
    name: str, tasks: Sequence[TaskRows], models: Sequence[PlannedModel], gates: tuple[ForeseenGate, ...], page: Path
) -> EvaluationPlan:
    """Tasks of lm-evaluation-harness put to the models."""
    counts = {task.name: len(task.rows) for task in tasks}
    return EvaluationPlan(
        "evaluate", name, "", SCORER, sum(counts.values()), counts, tuple(models), gates, (), str(page)
    )  # fmt: skip


def foreseen(
    gates: Sequence[ScoreGate], names: Sequence[str], reference: int, figures: Mapping[str, Items]
) -> tuple[ForeseenGate, ...]:
    """Each gate for each of its subjects among the models' ``names``; ``figures``: name -> the items that it is of."""
    return tuple(
        foresee(gate, name, len(figures[gate.metric]), group_names(figures[gate.metric]))
        for gate in gates
        for name in subjects_of(gate, names, reference)
    )


def of_suite(items: Iterable[SuiteItem]) -> Items:
    """As a figure is of them."""
    return [(item.name, item.group) for item in items]
