"""The first table of a parity report as values, for every form of it: the page, Markdown, the terminal, the Hub.

What a reader decides by: size, verdict, figures with unit and bound, speed, and what each row was judged by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora2serve.artifacts.metric_table import OVERVIEW, bound, figure, head_with_unit, info
from lora2serve.artifacts.parity_report import ComparisonResult, Metric, ParityReport, ReferenceName
from lora2serve.artifacts.recommendation import SERVED_IN, total
from lora2serve.console import size

HEADS: Mapping[str, str] = {
    "export": "Export",
    "engine": "Engine",
    "status": "Verdict",
    "size": "Size",
    **{name: head_with_unit(name) for name in OVERVIEW},
    "speed": "Speed, tokens/s",
    "reference": "Judged by",
}
OF_SETTINGS = ("export", "status", "size")  # where no engine was to be asked
NUMERIC = ("size", *OVERVIEW, "speed")
REFERENCES: Mapping[ReferenceName, str] = {
    "trained": "the trained model on its quantized base",
    "original": "the trained model on the full-precision base",
}
SHORT_REFERENCES: Mapping[ReferenceName, tuple[str, str]] = {
    "trained": ("trained model", "on its quantized base"),
    "original": ("trained model", "on the full-precision base"),
}
NOT_MEASURED = "not measured"
MEANINGS: Mapping[str, str] = {
    **{name: info(name).meaning for name in OVERVIEW},
    "speed": "Tokens of an answer per second on this machine, one answer at a time, reading the prompt included.",
}


@dataclass(frozen=True)
class Cell:
    """What is read first, and what stands smaller beneath it."""

    text: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class OverviewRow:
    """One row of the table; ``recommended``: where it is the export to ship, or nothing."""

    result: ComparisonResult
    cells: Mapping[str, Cell]
    recommended: str = ""


def columns(report: ParityReport) -> Mapping[str, str]:
    """Key -> head of the columns that this report has something for."""
    if any(row.engine for row in report.rows):
        return HEADS
    return {key: HEADS[key] for key in OF_SETTINGS}


def overview(report: ParityReport) -> list[OverviewRow]:
    """All rows, by where they are served, the smallest first."""
    places = list(dict.fromkeys(_place(row) for row in report.rows))
    best = {item.export: item.served_in for item in report.recommendations if item.export}
    rows = sorted(report.rows, key=lambda row: (places.index(_place(row)), total(row), row.export))
    return [
        OverviewRow(row, cells(row, report.rows), best.get(row.export, "") if row.status == "met" else "")
        for row in rows
    ]


def cells(row: ComparisonResult, rows: Sequence[ComparisonResult]) -> dict[str, Cell]:
    """Key of a column -> its cell; ``rows``: all of the report."""
    base = f"+ {size(row.base_size)} base" if row.base_size else ""
    speed = f"{row.speed:,.0f}" if row.speed >= 100 else f"{row.speed:.2g}"
    return {
        "export": Cell(row.export, _equal_files(row, rows)),
        "engine": Cell(row.engine or "-", row.computed),
        "status": Cell(row.status),
        "size": Cell(size(row.size) if row.size else "-", base),
        **{name: _figure(row, name) for name in OVERVIEW},
        "speed": Cell(speed if row.speed else NOT_MEASURED),
        "reference": Cell(*SHORT_REFERENCES[row.reference]),
    }


def unjudged(why: str) -> str:
    """In words that a figure has no bound here; empty where it has one, or its format none."""
    return f"shown, not judged: {why}" if why else ""


def _place(row: ComparisonResult) -> str:
    return SERVED_IN.get(row.target, row.target)


def _equal_files(row: ComparisonResult, rows: Sequence[ComparisonResult]) -> str:
    """The exports with equal files, for which the engine was asked once."""
    first = row.same_files or row.export
    others = [other for other in rows if other.engine == row.engine and first in (other.export, other.same_files)]
    names = [other.export for other in others if other.export != row.export]
    return f"same files as {', '.join(names)}: asked once" if names else ""


def _figure(row: ComparisonResult, name: str) -> Cell:
    check = row.check(name)
    if check is None:
        return Cell("-")
    if name == "equal_answers":
        return Cell(check.shown(), _near_ties(check, row.check("first_difference")))
    return Cell(check.shown(), bound(name, check.bound) or unjudged(check.unjudged))


def _near_ties(equal: Metric, judged: Metric | None) -> str:
    """Answers are judged by those that are equal, or part where the trained model holds two tokens for nearly alike."""
    if judged is None or judged.bound is None:
        return ""
    text = bound(judged.name, judged.bound)
    if judged.value == equal.value:
        return text
    return f"{figure(judged.name, judged.value)} but for near-ties, {text}"
