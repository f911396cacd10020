"""Points of a grid that is too large for all of them, spread over it as evenly as they can be."""

from __future__ import annotations

from collections.abc import Sequence

from lora2serve.sweeping.search_space import SearchPoint, SearchSpace


def spread(space: SearchSpace, count: int, there: Sequence[SearchPoint] = ()) -> list[SearchPoint]:
    """``count`` points of the first phase's grid, each the one furthest from all before it and from those ``there``."""
    left = [point for point in space.grid() if point not in there]
    chosen: list[SearchPoint] = []
    while left and len(chosen) < count:
        before = [*there, *chosen]
        point = max(left, key=lambda p: min((_apart(space, p, other) for other in before), default=0.0))
        chosen.append(point)
        left.remove(point)
    return chosen


def _apart(space: SearchSpace, one: SearchPoint, other: SearchPoint) -> float:
    """How many choices differ, that of the rate by how far."""
    rates = sorted({*space.rates, one.rate, other.rate})
    steps = abs(rates.index(one.rate) - rates.index(other.rate)) / max(1, len(rates) - 1)
    return steps + (one.targets != other.targets) + sum(a != b for a, b in zip(one.others, other.others, strict=False))
