"""The charts of the report as values; the templates draw them: marks in SVG that stretch, words in HTML that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora2serve.artifacts.parity_report import PromptFigures

LOWEST, HIGHEST = 1e-16, 1e2  # nats; what lies outside is drawn at the edge
MOST_POINTS = 4000  # more are thinned, the largest kept
MOST_BARS = 16
WIDTH, HEIGHT = 1000, 100  # of the drawing; the page stretches it
DATA_PARTS = ("task", "general")
SHADES = (1, 3, 10, 30)  # multiples of the bound of the mean from which a token is one shade darker


@dataclass(frozen=True)
class GridLine:
    """A power of ten."""

    percent: float  # from the bottom
    label: str


@dataclass(frozen=True)
class PositionChart:
    """One dot for each scored token, by its place in its text; KL in nats, logarithmic, beside the bound."""

    grid: Sequence[GridLine]
    bound: GridLine | None
    last: int  # the largest place
    paths: dict[str, str]  # part -> the dots as an SVG path
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class Bar:
    """The mean KL of one text."""

    part: str
    text: str
    title: str
    percent: float  # of the bound, or of the worst text's where that is more
    kl: float


@dataclass(frozen=True)
class HeatToken:
    """One token of a text, or several that make one character; ``shade`` is 0 to 4."""

    text: str
    shade: int
    is_worst: bool
    kl: float | None  # None: it was not predicted


def by_position(prompts: Sequence[PromptFigures], bound: float | None, label: str = "") -> PositionChart | None:
    """The chart of all texts, with a line at ``bound`` that ``label`` names; None where nothing differs."""
    dots = _thinned([(text.part, position, _bounded(kl)) for text in prompts for position, kl in enumerate(text.kl, 1)])
    if not any(text_kl for text in prompts for text_kl in text.kl):
        return None
    low, high = _decades([*(kl for _, _, kl in dots), *([bound] if bound else [])])
    last = max(position for _, position, _ in dots)

    def up(kl: float) -> float:
        return (math.log10(kl) - low) / (high - low)

    paths = dict.fromkeys(DATA_PARTS, "")
    for part, position, kl in dots:
        paths[part] += f"M{WIDTH * position / last:.0f} {HEIGHT * (1 - up(kl)):.1f}h0"
    step = max(1, math.ceil((high - low) / 5))
    return PositionChart(
        grid=[GridLine(100 * up(10.0**decade), _power(decade)) for decade in range(low, high + 1, step)],
        bound=GridLine(100 * up(bound), f"{label}: {bound:g}") if bound else None,
        last=last,
        paths={part: path for part, path in paths.items() if path},
    )


def by_text(prompts: Sequence[PromptFigures], bound: float | None) -> list[Bar]:
    """One bar for each text, the worst first; ``bound``: of the mean."""
    means = [(_bounded(sum(text.kl) / len(text.kl)), text) for text in prompts if text.kl]
    worst = sorted(means, key=lambda pair: -pair[0])[:MOST_BARS]
    top = max([kl for kl, _ in worst] + [bound or LOWEST])
    return [Bar(text.part, " ".join(text.text.split())[:90], text.text[:200], 100 * kl / top, kl) for kl, text in worst]


def heat(text: PromptFigures, bound: float) -> list[HeatToken]:
    """The tokens of a text, each as dark as its KL is beyond ``bound``: a text within it has no color.

    Tokens that make one character are one, with the largest KL of them.
    """
    tokens = [HeatToken(text.tokens[0], 0, False, None)]
    for token, kl in zip(text.tokens[1:], text.kl, strict=True):
        if token:
            tokens.append(HeatToken(token, _shade(kl, bound), False, kl))
        else:
            most = max(kl, tokens[-1].kl or 0.0)
            tokens[-1] = replace(tokens[-1], kl=most, shade=_shade(most, bound))
    worst = max(range(len(tokens)), key=lambda number: -1.0 if (kl := tokens[number].kl) is None else _bounded(kl))
    tokens[worst] = replace(tokens[worst], is_worst=tokens[worst].shade > 0)
    return tokens


def _shade(kl: float, bound: float) -> int:
    return sum(_bounded(kl) > times * bound for times in SHADES)


def _thinned(dots: Sequence[tuple[str, int, float]]) -> Sequence[tuple[str, int, float]]:
    if len(dots) <= MOST_POINTS:
        return dots
    ordered = sorted(dots, key=lambda dot: -dot[2])
    return ordered[: MOST_POINTS // 2] + ordered[MOST_POINTS // 2 :: max(1, 2 * len(ordered) // MOST_POINTS)]


def _bounded(kl: float) -> float:
    return min(max(kl, LOWEST), HIGHEST) if not math.isnan(kl) else HIGHEST


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _power(decade: int) -> str:
    """``1e-6`` in characters that a small screen has room for."""
    return f"10{str(decade).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}" if decade else "1"
