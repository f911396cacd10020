"""The pictures of the report, as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lora2serve.parity.report import PromptFigures

WIDTH, LEFT, RIGHT = 900, 52, 8
LOWEST, HIGHEST = 1e-16, 1e2  # nats; what lies outside is drawn at the edge
POINTS = 4000  # at most: more are thinned, the largest kept


def by_position(sequences: Sequence[Sequence[float]]) -> str:
    """One dot for each scored token, by its place in its text; KL in nats, logarithmic."""
    dots = [(place, _bounded(kl)) for sequence in sequences for place, kl in enumerate(sequence, 1)]
    if len(dots) > POINTS:
        ordered = sorted(dots, key=lambda dot: -dot[1])
        dots = ordered[: POINTS // 2] + ordered[POINTS // 2 :: max(1, 2 * len(ordered) // POINTS)]
    height, bottom = 220, 190
    low, high = _decades([kl for _, kl in dots])
    longest = max((place for place, _ in dots), default=1)

    def x(place: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * place / longest

    def y(kl: float) -> float:
        return bottom - (bottom - 10) * (math.log10(kl) - low) / (high - low)

    lines = [_grid(y(10.0**decade), f"1e{decade}") for decade in range(low, high + 1, max(1, (high - low) // 4))]
    marks = [f'<circle class="dot" cx="{x(place):.1f}" cy="{y(kl):.1f}" r="2"/>' for place, kl in dots]
    ends = [
        f'<text class="label" x="{LEFT}" y="{height - 8}">1</text>',
        f'<text class="label" x="{WIDTH - RIGHT}" y="{height - 8}" text-anchor="end">token {longest}</text>',
    ]
    return _svg(height, "KL by position", [*lines, *marks, *ends])


def by_prompt(prompts: Sequence[PromptFigures], bound: float | None, most: int = 24) -> str:
    """One bar for each text, the worst first, beside the bound for the mean."""
    means = [(sum(map(_bounded, one.kl)) / len(one.kl), one) for one in prompts if one.kl]
    worst = sorted(means, key=lambda pair: -pair[0])[:most]
    top = max([kl for kl, _ in worst] + [LOWEST])
    step = 18
    height, left = step * len(worst) + 8, 330
    scale = (WIDTH - left - 70) / top
    parts = []
    for number, (kl, one) in enumerate(worst):
        y = step * number + 4
        label = escape(" ".join(one.text.split())[:52])
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 12}" text-anchor="end">{label}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{y + 3}" width="{max(1.0, kl * scale):.1f}" height="11"/>')
        parts.append(f'<text class="label" x="{left + kl * scale + 5:.1f}" y="{y + 12}">{kl:.2g}</text>')
    if bound is not None and bound <= top:
        x = left + bound * scale
        parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    return _svg(height, "Mean KL by text", parts)


def _bounded(kl: float) -> float:
    return min(max(kl, LOWEST), HIGHEST) if not math.isnan(kl) else HIGHEST


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low = math.floor(math.log10(min(values, default=LOWEST)))
    return low, max(low + 1, math.ceil(math.log10(max(values, default=1.0))))


def _grid(y: float, label: str) -> str:
    line = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="label" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
    return "".join([head, *parts, "</svg>"])
