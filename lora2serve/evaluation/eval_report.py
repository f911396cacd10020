"""What an evaluation found: each model's figures, what differs between them, gates, and the items that changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.artifacts.suite_scores import SuiteFigure
from lora2serve.evaluation import stats
from lora2serve.evaluation.eval_records import ItemResult, SuiteEvaluation
from lora2serve.evaluation.score_gates import GateResult
from lora2serve.evaluation.stats import PairedDifference
from lora2serve.evaluation.suite_run import Measured

MOST_CHANGES = 40  # items of one pair that the page shows; all of them stand in the lines
LONGEST = 2000  # characters of an answer on the page
Finding = Literal["better", "worse", "different", "no difference", "not enough items"]
Figures = Mapping[str, tuple[str, str | None]]  # a metric's name -> the field of the items that it is of, and the task


@dataclass(frozen=True)
class SubjectRow(JsonRecord):
    """One model."""

    WHOLE: ClassVar[bool] = True

    name: str
    engine: str
    figures: Mapping[str, SuiteFigure]
    seconds: float = 0.0  # median of an item
    first_seconds: float | None = None
    tokens: int | None = None  # of all answers
    failed: int = 0
    overlap: str = ""
    cached: bool = False
    record: str = ""  # where its lines are


@dataclass(frozen=True)
class FigureDifference(JsonRecord):
    """One figure of one model less that of another; ``p_adjusted`` by Holm over all figures of the pair."""

    WHOLE: ClassVar[bool] = True

    subject: str
    against: str
    metric: str
    difference: PairedDifference
    p_adjusted: float
    verdict: Finding
    kind: Literal["score", "behavior"] = "score"


@dataclass(frozen=True)
class ItemChange(JsonRecord):
    """An item that one of two models won, or that they answer otherwise, where no score says which is better."""

    subject: str
    against: str
    id: str
    question: str
    expected: str
    before: str
    after: str
    won: bool | None
    task: str = ""


@dataclass(frozen=True, kw_only=True)
class EvalReport(JsonRecord):
    """report.json."""

    WHOLE: ClassVar[bool] = True

    format: int = 1
    command: Literal["evaluate", "compare"] = "evaluate"
    suite: str = ""
    suite_sha256: str = ""
    items: int = 0
    scorer: str = ""
    created: str = ""
    subjects: tuple[SubjectRow, ...] = ()
    differences: tuple[FigureDifference, ...] = ()
    gates: tuple[GateResult, ...] = ()
    changes: tuple[ItemChange, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether every gate is."""
        return all(gate.met for gate in self.gates)

    @property
    def title(self) -> str:
        """What was done, in a few words."""
        first, *_, last = [row.name for row in self.subjects] * 2
        return f"{last} beside {first}, {self.suite}" if self.command == "compare" else f"{self.suite}: {first}"


def subject_row(measured: Measured, evaluation: SuiteEvaluation, record: str, *, cached: bool) -> SubjectRow:
    """One line of the report's table."""
    tokens = [value for value in measured.vector("tokens") if math.isfinite(value)]
    return SubjectRow(
        measured.name, measured.engine, {k: v for k, v in evaluation.metrics.items() if k != "seconds"},
        median(measured.vector("seconds")) or 0.0, median(measured.vector("first_seconds")),
        int(sum(tokens)) if tokens else None, evaluation.failed, evaluation.overlap, cached, record,
    )  # fmt: skip


def differences(new: Measured, old: Measured, metrics: Mapping[str, str | None]) -> list[FigureDifference]:
    """Of each metric (name -> task), with its p-value adjusted for all of them."""
    paired = {
        name: stats.paired(old.vector("score", task), new.vector("score", task), new.groups(task))
        for name, task in metrics.items()
    }
    adjusted = stats.holm([difference.p for difference in paired.values()])
    return [
        FigureDifference(new.name, old.name, name, difference, p, difference.verdict(p=p))
        for (name, difference), p in zip(paired.items(), adjusted, strict=True)
    ]


def changes(new: Measured, old: Measured) -> list[ItemChange]:
    """The items whose score differs, those that were lost first."""
    changed = [
        item_change(new, old, before, after, won=after.score > before.score)
        for before, after in zip(old.items, new.items, strict=True)
        if after.score != before.score
    ]
    lost, won = ([item for item in changed if item.won == kind] for kind in (False, True))
    return [*lost[:MOST_CHANGES], *won[:MOST_CHANGES]]


def item_change(new: Measured, old: Measured, before: ItemResult, after: ItemResult, *, won: bool | None) -> ItemChange:
    """One item as both answered it."""
    expected = " | ".join(after.expected)
    return ItemChange(
        new.name, old.name, after.id, after.question, expected, _shown(before), _shown(after), won, after.task
    )


def median(values: Sequence[float]) -> float | None:
    """Of what is known."""
    known = sorted(value for value in values if math.isfinite(value) and value > 0)
    return known[len(known) // 2] if known else None


def _shown(item: ItemResult) -> str:
    return f"({item.error})" if item.error else item.answer[:LONGEST]
