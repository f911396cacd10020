"""report.html: one file that needs nothing else. Tables, charts of the KL, texts side by side; light and dark.

The page is ``templates/report.html.j2``; what it shows of a row is worked out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora2serve.artifacts import metric_table
from lora2serve.artifacts.metric_table import higher_is_better
from lora2serve.artifacts.parity_report import ComparisonResult, GreedyAnswer, Metric, ParityReport, TensorError
from lora2serve.parity_check.report.charts import Bar, HeatToken, PositionChart, by_position, by_text, heat

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_SHOWN = 8  # answers and tensors
REFERENCES = {"original": "on the full-precision base", "trained": "as trained, on the quantized base"}
PART_TITLES = {"task": "held-out rows", "general": "general text"}
BESIDE = ("mean_kl", "p99_kl", "top1", "ln_ppl_ratio")


@dataclass(frozen=True)
class TextView:
    """One of the texts with the largest KL, token by token."""

    summary: str
    tokens: Sequence[HeatToken]


@dataclass(frozen=True)
class AnswerView:
    """A greedy answer beside the reference's: what both begin with, and how each goes on."""

    prompt: str
    verdict: str
    common: str
    expected: str
    got: str
    same: bool


@dataclass(frozen=True)
class RowView:
    """What the page shows of one export in one engine, beside its gates."""

    result: ComparisonResult
    anchor: str
    chart: PositionChart | None
    bars: Sequence[Bar]
    beside: Mapping[str, Sequence[str]]  # what was compared -> its figures
    texts: Sequence[TextView]
    answers: Sequence[AnswerView]
    tensors: Sequence[TensorError]


def render(report: ParityReport) -> str:
    """The page."""
    views = [_view(row) for row in report.rows]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(report=report, views=views, parts=PART_TITLES, beside=BESIDE)
    )


def meter(check: Metric) -> float | None:
    """How much of its bound the worse end of the interval takes, in percent; None where it is not judged."""
    if check.bound is None or check.met is None:
        return None
    low, high = (check.value if end is None else end for end in (check.low, check.high))
    lower = higher_is_better(check.name)
    used, room = (1 - low, 1 - check.bound) if lower else (max(abs(low), abs(high)), check.bound)
    return 100 * (min(1.0, used / room) if room > 0 and math.isfinite(used) else float(not check.met))


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lora2serve.parity_check.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "overview": metric_table.OVERVIEW,
        "head": metric_table.head,
        "label": metric_table.label,
        "figure": metric_table.figure,
        "interval": metric_table.interval,
        "bound": metric_table.bound,
        "meter": meter,
    }
    return environment


def _view(row: ComparisonResult) -> RowView:
    bound = next((check.bound for gate in row.gates for check in gate.checks if check.name == "p999_kl"), None)
    return RowView(
        result=row,
        anchor="".join(c if c.isalnum() else "-" for c in f"{row.export}-{row.engine}"),
        chart=by_position(row.prompts, bound),
        bars=by_text(row.prompts),
        beside=_beside(row),
        texts=_texts(row),
        answers=[_answer(answer) for answer in sorted(row.answers, key=lambda answer: answer.parts < 0)[:MOST_SHOWN]],
        tensors=[error for error in row.tensors if error.nmse][:MOST_SHOWN],
    )


def _beside(row: ComparisonResult) -> Mapping[str, Sequence[str]]:
    """Both references, and both parts of the data."""
    if not row.beside and not row.parts:
        return {}
    compared = {f"all, {REFERENCES[row.reference]} (the verdict)": tuple(c for gate in row.gates for c in gate.checks)}
    compared |= {f"all, {REFERENCES.get(name, name)}": checks for name, checks in row.beside.items()}
    compared |= {PART_TITLES.get(name, name): checks for name, checks in row.parts.items()}
    shown = {who: {check.name: check.shown() for check in checks} for who, checks in compared.items()}
    return {who: [figures.get(name, "-") for name in BESIDE] for who, figures in shown.items()}


def _texts(row: ComparisonResult) -> list[TextView]:
    """The texts with the largest KL."""
    views = []
    for text in sorted((text for text in row.prompts if text.tokens), key=lambda text: max(text.kl), reverse=True):
        worst, mean = max(text.kl), sum(text.kl) / len(text.kl)
        at = text.kl.index(worst)
        summary = f"largest {worst:.2g} at token {at + 2}, {text.tokens[at + 1]!r}; mean {mean:.2g}"
        views.append(TextView(summary, heat(text)))
    return views


def _answer(answer: GreedyAnswer) -> AnswerView:
    pairs = enumerate(zip(answer.expected, answer.got, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(answer.expected), len(answer.got)))
    return AnswerView(
        prompt=answer.prompt,
        verdict="the same" if answer.parts < 0 else f"parts at token {answer.parts + 1}",
        common=answer.expected[:at],
        expected=answer.expected[at:],
        got=answer.got[at:],
        same=answer.expected == answer.got,
    )
