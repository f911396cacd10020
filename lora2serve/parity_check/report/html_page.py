"""report.html: one file that needs nothing else. Tables, charts of the KL, texts side by side; light and dark.

The page is ``templates/report.html.j2``; what it shows of a row is worked out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lora2serve import console
from lora2serve.artifacts import metric_table, parity_overview
from lora2serve.artifacts.metric_table import higher_is_better
from lora2serve.artifacts.parity_overview import REFERENCES
from lora2serve.artifacts.parity_report import ComparisonResult, GreedyAnswer, Metric, ParityReport, TensorError
from lora2serve.parity_check.report.characters import start_of_character
from lora2serve.parity_check.report.charts import SHADES, Bar, HeatToken, PositionChart, by_position, by_text, heat
from lora2serve.parity_check.token_pieces import quoted

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_SHOWN = 8  # answers and tensors
SEEN = 0.01  # nats: what a token is shaded from where its format has no bound for the mean
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
    shading: str  # from where on a token is shaded, in words
    answers: Sequence[AnswerView]
    tensors: Sequence[TensorError]


@dataclass(frozen=True)
class AskedView:
    """Who answered the user's question; of an export, what the reference that it is judged by answered."""

    who: str
    answer: str
    judge: str = ""
    expected: str | None = None


def render(report: ParityReport) -> str:
    """The page."""
    lines = parity_overview.overview(report)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            verdict=verdict(report),
            heads=parity_overview.columns(report),
            lines=lines,
            asked=_asked(report),
            views=[_view(line.result) for line in lines],
        )
    )


def verdict(report: ParityReport) -> str:
    """The whole report in a sentence or two."""
    red, count = [row for row in report.rows if row.red], len(report.rows)
    first = (
        f"{len(red)} of {count} comparisons {'is' if len(red) == 1 else 'are'} not met: {red[0].title}: {_why(red[0])}."
        if red
        else ""
    )
    if not any(row.engine for row in report.rows):
        return f"All that lies beside the weights was compared, and no engine asked: {first or 'all is as planned.'}"
    met = sum(row.status == "met" for row in report.rows)
    if not red and not met:
        return "Nothing was compared: no engine of these exports is installed here."
    sentences = [first or "Each export answers like the trained model, within the bounds of its format."]
    if report.regressions:
        sentences.append("But it got worse than the baseline.")
    if not red and met < count:
        were = "was" if count - met == 1 else "were"
        sentences.append(f"{count - met} of {count} comparisons {were} not made: the engine is not here.")
    return " ".join(sentences)


def _why(row: ComparisonResult) -> str:
    gate = row.gate
    assert gate is not None
    return gate.cause or gate.first or gate.status


def _asked(report: ParityReport) -> list[AskedView]:
    """The references' answers, then each export's beside that of its own reference."""
    answers, question = report.question.answers, report.question
    by_title = {row.title: row for row in report.rows}
    views = []
    for who, answer in answers.items():
        row = by_title.get(who)
        if row is None:
            views.append(AskedView(who, answer))
        else:
            views.append(AskedView(who, answer, REFERENCES[row.reference], question.expected(row.reference)))
    return views


def meter(check: Metric) -> float | None:
    """How much of its bound the worse end of the interval takes, in percent; None where it is not judged."""
    if check.bound is None or check.met is None:
        return None
    low, high = (check.value if end is None else end for end in (check.low, check.high))
    lower = higher_is_better(check.name)
    used, room = (1 - low, 1 - check.bound) if lower else (max(abs(low), abs(high)), check.bound)
    return 100 * (min(1.0, used / room) if room > 0 and math.isfinite(used) else float(not check.met))


def page_environment(*packages: str) -> Environment:
    """For the pages of all reports: the templates of ``packages``, and the style and the tables of this one."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "lora2serve.parity_check.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache  # its templates are compiled once
def _environment() -> Environment:
    environment = page_environment()
    environment.globals |= {
        "head": metric_table.head,
        "label": metric_table.label,
        "figure": metric_table.figure,
        "interval": metric_table.interval,
        "bound": metric_table.bound,
        "meter": meter,
        "size": console.size,
        "anchor": _anchor,
        "unjudged": parity_overview.unjudged,
        "numeric": parity_overview.NUMERIC,
        "meanings": parity_overview.MEANINGS,
        "references": REFERENCES,
        "parts": PART_TITLES,
        "beside": BESIDE,
    }
    return environment


def _anchor(row: ComparisonResult) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{row.export}-{row.engine}")


def _view(row: ComparisonResult) -> RowView:
    of_mean, tail = (check.bound if (check := row.check(name)) else None for name in ("mean_kl", "p999_kl"))
    line = (tail, "bound for 99.9 %") if tail else (of_mean, "bound of the mean")
    texts = _texts(row, of_mean or SEEN)
    return RowView(
        result=row,
        anchor=_anchor(row),
        chart=by_position(row.prompts, *line),
        bars=by_text(row.prompts, of_mean),
        beside=_beside(row),
        texts=texts,
        shading=_shading(texts, of_mean),
        answers=[_answer(answer) for answer in sorted(row.answers, key=lambda answer: answer.parts < 0)[:MOST_SHOWN]],
        tensors=[error for error in row.tensors if error.nmse][:MOST_SHOWN],
    )


def _shading(texts: Sequence[TextView], bound: float | None) -> str:
    """From where on tokens are shaded."""
    edge = f"the bound of the mean, {bound:g} nats" if bound else f"{SEEN:g} nats"
    if not any(token.shade for text in texts for token in text.tokens):
        return f"No token is further off than {edge}: nothing is shaded."
    return f"A token is shaded from {edge} on, and darkest from {SHADES[-1]} times that."


def _beside(row: ComparisonResult) -> Mapping[str, Sequence[str]]:
    """Both references, and both parts of the data."""
    if not row.beside and not row.parts:
        return {}
    references = {str(name): words for name, words in REFERENCES.items()}
    compared = {f"{REFERENCES[row.reference]} (the verdict)": tuple(c for gate in row.gates for c in gate.checks)}
    compared |= {references.get(name, name): checks for name, checks in row.beside.items()}
    compared |= {PART_TITLES.get(name, name): checks for name, checks in row.parts.items()}
    shown = {who: {check.name: check.shown() for check in checks} for who, checks in compared.items()}
    return {who: [figures.get(name, "-") for name in BESIDE] for who, figures in shown.items()}


def _texts(row: ComparisonResult, bound: float) -> list[TextView]:
    """The texts with the largest KL."""
    views = []
    for text in sorted((text for text in row.prompts if text.tokens), key=lambda text: max(text.kl), reverse=True):
        worst, mean = max(text.kl), sum(text.kl) / len(text.kl)
        at = text.kl.index(worst) + 1
        word = next((token for token in reversed(text.tokens[: at + 1]) if token), "")
        views.append(
            TextView(f"largest {worst:.2g} at token {at + 1}, {quoted(word)}; mean {mean:.2g}", heat(text, bound))
        )
    return views


def _answer(answer: GreedyAnswer) -> AnswerView:
    pairs = enumerate(zip(answer.expected, answer.got, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(answer.expected), len(answer.got)))
    at = min(start_of_character(text, at) for text in (answer.expected, answer.got))
    return AnswerView(
        prompt=answer.prompt,
        verdict="the same" if answer.parts < 0 else f"parts at token {answer.parts + 1}",
        common=answer.expected[:at],
        expected=answer.expected[at:],
        got=answer.got[at:],
        same=answer.expected == answer.got,
    )
