"""The Pareto front: what no other point beats in one figure without losing in another; smaller is better in all."""

from __future__ import annotations

from collections.abc import Sequence

Values = Sequence[float]


def dominates(one: Values, other: Values) -> bool:
    """Whether ``one`` is nowhere worse, and somewhere better."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front(points: Sequence[Values]) -> list[int]:
    """The numbers of those that none dominates, in their order; of two equal ones, the first."""
    ordered = sorted(range(len(points)), key=lambda number: (tuple(points[number]), number))
    chosen: list[int] = []
    for number in ordered:  # who dominates it stands before it
        values = points[number]
        if not any(dominates(points[n], values) or tuple(points[n]) == tuple(values) for n in chosen):
            chosen.append(number)
    return sorted(chosen)


def hypervolume(points: Sequence[Values], reference: Values) -> float:
    """The volume between the points and ``reference``, which is worse than all: by slices of the last figure."""
    inside = [tuple(p) for p in points if all(a < b for a, b in zip(p, reference, strict=True))]
    return _sliced([inside[number] for number in front(inside)], tuple(reference))


def _sliced(points: Sequence[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    if not points:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in points)
    ordered = sorted(points, key=lambda point: point[-1])
    ends = [*(point[-1] for point in ordered[1:]), reference[-1]]
    total = 0.0
    for count, (point, end) in enumerate(zip(ordered, ends, strict=True), 1):
        if end > point[-1]:
            below = [kept[:-1] for kept in ordered[:count]]
            total += (end - point[-1]) * _sliced([below[number] for number in front(below)], reference[:-1])
    return total


def normalized(points: Sequence[Values]) -> list[tuple[float, ...]]:
    """Each figure from 0, the best, to 1, the worst; 0 where all are equal."""
    if not points:
        return []
    columns = list(zip(*points, strict=True))
    spans = [(min(column), max(column) - min(column)) for column in columns]
    return [
        tuple((value - low) / span if span else 0.0 for value, (low, span) in zip(p, spans, strict=True))
        for p in points
    ]
