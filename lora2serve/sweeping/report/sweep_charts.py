"""The charts of a sweep's page as values; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora2serve.console import size
from lora2serve.sweeping.sweep_quality import EVAL_LOSS, Quality
from lora2serve.sweeping.sweep_report import SweepReport, TrialLine

WIDTH, HEIGHT = 1000, 100  # of the drawing; the page stretches it
LINES = 4  # of a grid
EDGE = 0.06  # of the chart's width, beside the outermost points


@dataclass(frozen=True)
class Tick:
    """A line of the grid, or a word below the chart."""

    percent: float
    label: str


@dataclass(frozen=True)
class FrontChart:
    """Each configuration by what it takes and its loss or score: dots of the front, and the others."""

    title: str
    grid: Sequence[Tick]
    below: Sequence[Tick]
    front: str  # dots as an SVG path
    others: str
    line: str  # through the front


@dataclass(frozen=True)
class Curve:
    """The eval loss of one trial by step, as an SVG path."""

    path: str
    on_front: bool


@dataclass(frozen=True)
class CurveChart:
    """The trials of all of the search's steps."""

    grid: Sequence[Tick]
    last: int
    curves: Sequence[Curve]


def front_charts(report: SweepReport) -> list[FrontChart]:
    """The loss or score beside memory, time and parameters, of the trials with all steps of the search."""
    lines = _whole(report)
    if len(lines) < 2:
        return []
    axes = {
        "memory": ([float(o.memory) for line in lines if (o := line.objectives)], size),
        "training time": ([o.seconds for line in lines if (o := line.objectives)], lambda value: f"{value:.3g} s"),
        "parameters learned": ([float(o.parameters) for line in lines if (o := line.objectives)], _count),
    }
    charts = []
    for title, (values, shown) in axes.items():
        if max(values) > min(values):
            charts.append(_front_chart(title, report.quality, lines, values, [shown(min(values)), shown(max(values))]))
    return charts


def curve_chart(report: SweepReport) -> CurveChart | None:
    """Eval losses by step; None where no trial was evaluated more than once."""
    lines = [line for line in _whole(report) if len(line.curve) > 1]
    if not lines:
        return None
    base = report.base_loss if report.base_eval_loss is None else report.base_eval_loss
    values = [base, *(loss for line in lines for _, loss in line.curve)]
    low, high, last = min(values), max(values), max(step for line in lines for step, _ in line.curve)

    def point(step: int, loss: float) -> str:
        return f"{WIDTH * step / last:.0f} {HEIGHT * (1 - _share(loss, low, high)):.1f}"

    curves = [
        Curve("M" + "L".join(point(*pair) for pair in [(0, base), *line.curve]), line.on_front)
        for line in sorted(lines, key=lambda line: line.on_front)
    ]
    return CurveChart(_grid(low, high, EVAL_LOSS), last, curves)


def _whole(report: SweepReport) -> list[TrialLine]:
    return [line for line in report.trials if line.level >= 0 and line.share == 1.0 and line.objectives]


def _front_chart(
    title: str, quality: Quality, lines: Sequence[TrialLine], values: Sequence[float], ends: Sequence[str]
) -> FrontChart:
    losses = [o.loss for line in lines if (o := line.objectives)]
    figures = [quality.figure(loss) for loss in losses]
    low, high = min(figures), max(figures)
    places = [EDGE + (1 - 2 * EDGE) * _share(math.log(v), math.log(min(values)), math.log(max(values))) for v in values]
    heights = [_share(figure, low, high) for figure in figures]
    placed = zip(lines, places, heights, strict=True)
    dots = [(line.on_front, f"{WIDTH * x:.0f} {HEIGHT * (1 - y):.1f}") for line, x, y in placed]
    best: list[tuple[float, float, float]] = []
    for x, loss, y in sorted(zip(places, losses, heights, strict=True)):
        if not best or loss < best[-1][1]:
            best.append((x, loss, y))
    return FrontChart(
        title=title, grid=_grid(low, high, quality), below=[Tick(100 * EDGE, ends[0]), Tick(100 * (1 - EDGE), ends[1])],
        front="".join(f"M{at}h0" for is_front, at in dots if is_front),
        others="".join(f"M{at}h0" for is_front, at in dots if not is_front),
        line="M" + "L".join(f"{WIDTH * x:.0f} {HEIGHT * (1 - y):.1f}" for x, _, y in best),
    )  # fmt: skip


def _grid(low: float, high: float, quality: Quality) -> list[Tick]:
    marks = [low + (high - low) * n / LINES for n in range(LINES + 1)]
    return [Tick(100 * n / LINES, quality.mark(mark)) for n, mark in enumerate(marks)]


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _count(value: float) -> str:
    return f"{value / 1e6:.2g} M" if value >= 1e6 else f"{value / 1e3:.3g} k"
