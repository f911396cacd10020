"""The pictures of the report: marks in SVG that stretch, words in HTML that do not, colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lora2serve.artifacts.parity_report import PromptFigures

LOWEST, HIGHEST = 1e-16, 1e2  # nats; what lies outside is drawn at the edge
POINTS = 4000  # at most: more are thinned, the largest kept
WIDTH, HEIGHT = 1000, 100  # of the drawing; the page stretches it
PARTS = {"task": "held-out rows", "general": "general text"}


def by_position(prompts: Sequence[PromptFigures], bound: float | None) -> str:
    """One dot for each scored token, by its place in its text; KL in nats, logarithmic, beside the bound."""
    dots = [(one.part, place, _bounded(kl)) for one in prompts for place, kl in enumerate(one.kl, 1)]
    if not dots:
        return ""
    shown = _thinned(dots)
    low, high = _decades([*(kl for _, _, kl in shown), *([bound] if bound else [])])
    longest = max(place for _, place, _ in shown)

    def up(kl: float) -> float:
        return (math.log10(kl) - low) / (high - low)

    step = max(1, math.ceil((high - low) / 5))
    words = [_line(up(10.0**decade), _power(decade)) for decade in range(low, high + 1, step)]
    if bound:
        words.append(f'<hr class="bound" style="bottom:{100 * up(bound):.2f}%">')
        words.append(f'<span class="bound" style="bottom:{100 * up(bound):.2f}%">bound for 99.9 %: {bound:g}</span>')
    words.append('<span class="x" style="left:0">token 1</span>')
    words.append(f'<span class="x" style="right:0">token {longest}</span>')
    paths = [
        f'<path class="{part}" vector-effect="non-scaling-stroke" d="{marks}"/>'
        for part in PARTS
        if (
            marks := "".join(
                f"M{WIDTH * place / longest:.0f} {HEIGHT * (1 - up(kl)):.1f}h0" for p, place, kl in shown if p == part
            )
        )
    ]
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="KL by position">{"".join(paths)}</svg>'
    )
    return f'{key()}<div class="plot">{"".join(words)}{drawing}</div>'


def key() -> str:
    """Which colour is which."""
    return '<p class="key">' + "".join(f'<b class="{part}">{words}</b>' for part, words in PARTS.items()) + "</p>"


def by_prompt(prompts: Sequence[PromptFigures], most: int = 16) -> str:
    """One bar for each text, the worst first."""
    means = [(sum(map(_bounded, one.kl)) / len(one.kl), one) for one in prompts if one.kl]
    worst = sorted(means, key=lambda pair: -pair[0])[:most]
    top = max([kl for kl, _ in worst] + [LOWEST])
    bars = [
        f'<span title="{escape(one.text[:200])}">{escape(" ".join(one.text.split())[:90])}</span>'
        f'<div class="{one.part}"><i style="width:{100 * kl / top:.1f}%"></i></div><em>{kl:.2g}</em>'
        for kl, one in worst
    ]
    return f'<div class="bars">{"".join(bars)}</div>' if bars else ""


def heat(prompt: PromptFigures) -> str:
    """The tokens of a text, each as dark as its KL is large; the largest has a frame."""
    top = max(map(_bounded, prompt.kl))
    worst = prompt.kl.index(max(prompt.kl))
    spans = [escape(prompt.tokens[0])]
    for number, (token, kl) in enumerate(zip(prompt.tokens[1:], prompt.kl, strict=True)):
        shade = _shade(_bounded(kl) / top)
        classes = " ".join([*([f"h{shade}"] if shade else []), *(["most"] if number == worst else [])])
        word = escape(token)
        spans.append(f'<i class="{classes}" title="KL {kl:.2g}">{word}</i>' if classes else word)
    return f'<div class="heat">{"".join(spans)}</div>'


def _shade(share: float) -> int:
    return sum(share > edge for edge in (0.03, 0.1, 0.3, 0.6))


def _thinned(dots: Sequence[tuple[str, int, float]]) -> Sequence[tuple[str, int, float]]:
    if len(dots) <= POINTS:
        return dots
    ordered = sorted(dots, key=lambda dot: -dot[2])
    return ordered[: POINTS // 2] + ordered[POINTS // 2 :: max(1, 2 * len(ordered) // POINTS)]


def _bounded(kl: float) -> float:
    return min(max(kl, LOWEST), HIGHEST) if not math.isnan(kl) else HIGHEST


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _line(share: float, label: str) -> str:
    place = f'style="bottom:{100 * share:.2f}%"'
    return f'<hr {place}><span class="y" {place}>{label}</span>'


def _power(decade: int) -> str:
    """``1e-6`` as words that a small screen has room for."""
    return f"10{str(decade).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}" if decade else "1"
