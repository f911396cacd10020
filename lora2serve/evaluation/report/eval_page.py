"""report.html of an evaluation: scores by task with their intervals, what differs, the items that were won and lost.

The page is ``templates/evaluation.html.j2``, in the style of parity's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.suite_scores import SuiteFigure
from lora2serve.evaluation.eval_records import SuiteEvaluation, items_path, write_items, write_whole
from lora2serve.evaluation.eval_report import MOST_CHANGES, EvalReport, FigureDifference
from lora2serve.evaluation.suite_run import Measured
from lora2serve.parity_check.report.html_page import page_environment

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE, DATA = "report.html", "report.json"
SHARES = ("acc", "f1", "judge", "score", "changed")  # figures from 0 to 1, which are drawn
FACTORS = ("seconds", "first_seconds", "length")  # whose differences are of logarithms: times so much
LABELS = {
    "acc": "accuracy", "f1": "F1", "judge": "judge", "score": "score", "changed": "answers changed",
    "kl": "KL of the first token", "length": "length of an answer", "refusals": "refusals", "json": "valid JSON",
    "seconds": "seconds", "first_seconds": "seconds to the first words",
}  # fmt: skip


@dataclass(frozen=True)
class ScoreBar:
    """One figure of one model, in percent of the width."""

    name: str
    value: str
    percent: float
    low: float
    width: float
    interval: str


def write_record(path: Path, record: SuiteEvaluation, measured: Measured) -> None:
    """``SUITE.json`` and its lines."""
    write_items(measured.items, items_path(path))
    write_whole(path, record.to_text())


def write(report: EvalReport, directory: Path) -> Path:
    """report.json and the page, whose path is returned."""
    write_whole(directory / DATA, json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
    write_whole(directory / PAGE, render(report))
    return directory / PAGE


def render(report: EvalReport) -> str:
    """The page."""
    names = list(dict.fromkeys(name for row in report.subjects for name in row.figures))
    return (
        _environment()
        .get_template("evaluation.html.j2")
        .render(
            report=report,
            verdict=verdict(report),
            counted=counted(report),
            metrics=names,
            charts={name: _bars(report, name) for name in names},
            pairs=list(dict.fromkeys((change.subject, change.against) for change in report.changes)),
        )
    )


@cache  # its templates are compiled once
def _environment() -> Environment:
    environment = page_environment("lora2serve.evaluation.report")
    environment.globals |= {
        "shown": shown, "label": label, "difference": difference_text, "smallest": smallest_text, "most": MOST_CHANGES,
    }  # fmt: skip
    return environment


def verdict(report: EvalReport) -> str:
    """The whole report in a sentence or two."""
    first = [item for item in report.differences if item.kind == "score"]
    by_subject = {item.subject: item for item in reversed(first)}
    sentences = [_sentence(item) for item in reversed(by_subject.values())]
    sentences += [_changed(report, item) for item in report.differences if item.metric == "changed"]
    if not sentences and report.subjects:
        row = report.subjects[0]
        figures = [f"{label(name)} {shown(figure)}" for name, figure in row.figures.items()][:1]
        sentences = [f"{row.name}: {figures[0]} of {report.items} items." if figures else f"{report.items} items."]
    missed = [gate for gate in report.gates if not gate.met]
    if missed:
        sentences.append(f"{len(missed)} of {len(report.gates)} gates are not met.")
    return " ".join(sentences)


def _sentence(item: FigureDifference) -> str:
    found = item.difference
    ends = f"{difference_text(item)}, p {item.p_adjusted:.2g}"
    if item.verdict in ("better", "worse"):
        return f"{item.subject} is {item.verdict} than {item.against}: {ends}."
    if item.verdict == "no difference":
        return f"{item.subject} and {item.against} do not differ: {ends}."
    least = f"they show a difference of {smallest_text(item)} at least"
    if _shows_none(item):
        least = "so few show none at all"
    if not math.isfinite(found.smallest):
        least = f"{found.groups} groups show none at all"
    return f"{found.items} items are not enough to tell {item.subject} and {item.against} apart: {ends}; {least}."


def _changed(report: EvalReport, item: FigureDifference) -> str:
    """How many answers are others, beside how many are where the first model is asked again."""
    _, again, new = report.subjects
    found = {"different": "more than it differs from itself", "no difference": "no more than it differs from itself"}
    return (
        f"{shown(new.figures['changed'])} of the answers are not those of {item.against}, "
        f"{shown(again.figures['changed'])} where that is asked again: {found.get(item.verdict, item.verdict)}."
    )


def shown(figure: SuiteFigure) -> str:
    """A share in percent."""
    return f"{100 * figure.value:.1f} %"


def label(name: str) -> str:
    """A figure in words; behind it the task that it is of."""
    metric, _, task = name.partition("-")
    return f"{LABELS.get(metric, metric)}{f', {task}' if task else ''}"


def difference_text(item: FigureDifference) -> str:
    """With its interval: in points of a share, or as a factor."""
    found, metric = item.difference, item.metric.partition("-")[0]
    if metric in FACTORS:
        ends = [f"{math.exp(end):.2f}" if math.isfinite(end) else "?" for end in (found.low, found.high)]
        return f"times {math.exp(found.value):.2f} ({ends[0]} to {ends[1]})"
    scale, unit = _unit(metric)
    ends = [f"{scale * end:+.3g}" if math.isfinite(end) else "?" for end in (found.low, found.high)]
    return f"{scale * found.value:+.3g}{unit} ({ends[0]} to {ends[1]})"


def smallest_text(item: FigureDifference) -> str:
    """What so many items show, as ``difference_text`` has it."""
    smallest, metric = item.difference.smallest, item.metric.partition("-")[0]
    if not math.isfinite(smallest):
        return "?"
    if _shows_none(item):
        return "none"
    scale, unit = _unit(metric)
    if metric in FACTORS:
        return f"times {math.exp(smallest):.2f}"
    return f"{Decimal(f'{scale * smallest:.2g}'):f}{unit}"  # 100, not 1e+02


def _shows_none(item: FigureDifference) -> bool:
    """Whether a share would have to change by more than all of it."""
    return _unit(item.metric.partition("-")[0])[0] == 100 and 1 < item.difference.smallest < math.inf


def counted(report: EvalReport) -> tuple[str, str]:
    """What items are whose figure rose and fell: of seconds, say, a rise is nothing won."""
    scores = all(item.kind == "score" for item in report.differences)
    return ("won", "lost") if scores else ("higher", "lower")


def _unit(metric: str) -> tuple[int, str]:
    return (100, " points") if metric != "kl" else (1, " nats")


def _bars(report: EvalReport, metric: str) -> Sequence[ScoreBar]:
    bars = []
    for row in report.subjects:
        figure = row.figures.get(metric)
        if figure is None or metric.partition("-")[0] not in SHARES:
            continue
        low, high = (0.0 if figure.low is None else figure.low), (1.0 if figure.high is None else figure.high)
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        bars.append(ScoreBar(row.name, shown(figure), 100 * figure.value, 100 * low, 100 * (high - low), interval))
    return bars
