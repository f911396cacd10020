"""Two windows of requests, feature by feature: is it chance, and is it large enough to matter.

Chance: a permutation test of who belongs to which window; whole units (clients, sessions) are moved, since the requests
of one are alike. Holm over the features. Large enough: Cliff's delta for numbers (by ranks: times of long tails do not
decide), the difference of shares, the total variation of categories. Both must hold for an alarm: of enough requests
every small difference is no chance. PSI is for people, who know its 0.1 and 0.25; it decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from lora2serve.artifacts.json_record import JsonRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

T = TypeVar("T")
FeatureKind = Literal["number", "share", "category"]
LEVEL = 0.01  # of all features together: one false alarm in a hundred windows
PERMUTATIONS = 2000
SMALLEST: Mapping[FeatureKind, float] = {"number": 0.1, "share": 0.03, "category": 0.05}  # effect that is an alarm
MOST_UNITS = 2000  # of each window that are compared
UNSEEN = "prompt.unseen"  # share of a prompt's word pairs that are rare in the reference
RARE = 200  # a pair is rare that fewer than one in so many prompts have
BINS = 10


@dataclass(frozen=True)
class WindowRow:
    """One request: whom it is from, and its features."""

    unit: str
    numbers: Mapping[str, float]
    shares: Mapping[str, float]  # 0 or 1
    categories: Mapping[str, str]
    pairs: tuple[int, ...] = ()


@dataclass(frozen=True)
class DriftBin(JsonRecord):
    """One bar of a histogram: shares of the reference and of the current window."""

    WHOLE: ClassVar[bool] = True

    label: str
    reference: float
    current: float


@dataclass(frozen=True)
class FeatureDrift(JsonRecord):
    """One feature in both windows. ``reference`` and ``current`` are medians, shares, or shares of the first category.

    ``effect`` is Cliff's delta, a difference of shares, or the total variation; ``adjusted`` is ``p`` after Holm.
    """

    WHOLE: ClassVar[bool] = True

    feature: str
    kind: FeatureKind
    reference: float
    current: float
    effect: float
    p: float
    adjusted: float
    psi: float
    drifted: bool
    bins: tuple[DriftBin, ...] = ()


def compare_windows(reference: Sequence[WindowRow], current: Sequence[WindowRow], seed: int = 0) -> list[FeatureDrift]:
    """Every feature that both windows have and that is not the same in all requests; what drifted most comes first."""
    from lora2serve.evaluation.stats import holm

    reference, current, draws = _thinned(reference), _thinned(current), _Permutations(seed)
    found = [
        _tested(name, kind, before, now, draws)
        for name, kind, before, now in _features(reference, current)
        if before and now and len({value for _, value in (*before, *now)}) > 1
    ]
    adjusted = holm([each.p for each in found])
    judged = [
        replace(each, adjusted=p, drifted=p <= LEVEL and abs(each.effect) >= SMALLEST[each.kind])
        for each, p in zip(found, adjusted, strict=True)
    ]
    return sorted(judged, key=lambda each: (not each.drifted, each.adjusted, -abs(each.effect)))


Column = list[tuple[str, float | str]]  # unit and value of each request that has the feature


def _features(
    reference: Sequence[WindowRow], current: Sequence[WindowRow]
) -> list[tuple[str, FeatureKind, Column, Column]]:
    found: list[tuple[str, FeatureKind, Column, Column]] = []
    parts: tuple[tuple[FeatureKind, str], ...] = (
        ("number", "numbers"),
        ("share", "shares"),
        ("category", "categories"),
    )
    for kind, part in parts:
        names = sorted({name for row in (*reference, *current) for name in getattr(row, part)})
        found += [(name, kind, _column(reference, part, name), _column(current, part, name)) for name in names]
    known, held = reference[::2], reference[1::2]  # what is rare is known from one half, and told of the other
    counts = Counter(pair for row in known for pair in set(row.pairs))
    rare = {pair for row in (*held, *current) for pair in row.pairs if counts[pair] * RARE < len(known)}
    found.append((UNSEEN, "number", _unseen(held, rare), _unseen(current, rare)))
    return found


def _column(rows: Sequence[WindowRow], part: str, name: str) -> Column:
    return [(row.unit, getattr(row, part)[name]) for row in rows if name in getattr(row, part)]


def _unseen(rows: Sequence[WindowRow], rare: set[int]) -> Column:
    return [(row.unit, sum(pair in rare for pair in row.pairs) / len(row.pairs)) for row in rows if row.pairs]


def _thinned(rows: Sequence[WindowRow]) -> list[WindowRow]:
    """All rows of some units, evenly over the window, in an order in which each unit stands once."""
    by_unit: dict[str, list[WindowRow]] = {}
    for row in rows:
        by_unit.setdefault(row.unit, []).append(row)
    return [row for rows_of_unit in evenly(list(by_unit.values()), MOST_UNITS) for row in rows_of_unit]


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many, evenly over all, in their order."""
    return items if len(items) <= most else [items[int(number * (len(items) / most))] for number in range(most)]


class _Permutations:
    """Which of n units are in the current window, which has m: the same draws for features of the same sizes."""

    def __init__(self, seed: int) -> None:
        self._seed, self._masks = seed, dict[tuple[int, int], "Floats"]()

    def masks(self, n: int, m: int) -> Floats:
        """(PERMUTATIONS, n): 1 where a unit is in the current window."""
        import numpy as np

        if (n, m) not in self._masks:
            drawn = np.random.default_rng(self._seed).random((PERMUTATIONS, n))
            last = np.partition(drawn, m - 1, axis=1)[:, m - 1 : m]  # those that drew the m smallest numbers are in it
            self._masks[n, m] = (drawn <= last).astype(np.float64)
        return self._masks[n, m]


def _tested(name: str, kind: FeatureKind, before: Column, now: Column, draws: _Permutations) -> FeatureDrift:
    import numpy as np

    values = [value for _, value in (*before, *now)]
    columns, categories = _encoded(kind, values)
    units, of_current = _means_of_units(columns, before, now)
    masks = draws.masks(len(units), of_current)
    observed = units[-of_current:].mean(axis=0) - units[:-of_current].mean(axis=0)
    inside = masks @ units
    shuffled = inside / of_current - (units.sum(axis=0) - inside) / (len(units) - of_current)
    statistics, statistic = np.abs(shuffled).sum(axis=1), float(np.abs(observed).sum())
    p = (1 + int((statistics >= statistic * (1 - 1e-9)).sum())) / (1 + PERMUTATIONS)
    effect = float(np.abs(observed).sum() / 2) if kind == "category" else float(observed[0])
    bins = _histogram(kind, before, now, categories)
    first, second = (_figure(kind, column, categories) for column in (before, now))
    return FeatureDrift(name, kind, first, second, effect, p, p, _psi(bins, len(before), len(now)), False, bins)


def _encoded(kind: FeatureKind, values: Sequence[float | str]) -> tuple[Floats, list[str]]:
    """(n, columns): ranks from 0 to 2, whose difference of means is Cliff's delta; 0 or 1; one column a category."""
    import numpy as np

    if kind == "category":
        names = [str(name) for name, _ in Counter(values).most_common()]
        return np.array([[float(value == name) for name in names] for value in values]), names
    numbers = np.asarray(values, dtype=np.float64)
    if kind == "share":
        return numbers[:, None], []
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[places]
    return (2 * ranks / len(numbers))[:, None], []


def _means_of_units(columns: Floats, before: Column, now: Column) -> tuple[Floats, int]:
    """(units, columns): the mean of each unit in each window, those of the current one last; how many those are."""
    import numpy as np

    keys = [(0, unit) for unit, _ in before] + [(1, unit) for unit, _ in now]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    places = np.array([numbers[key] for key in keys])
    sums = np.stack([np.bincount(places, column) for column in columns.T], axis=1)
    return sums / np.bincount(places)[:, None], len({unit for unit, _ in now})


def _figure(kind: FeatureKind, column: Column, categories: Sequence[str]) -> float:
    values = [value for _, value in column]
    if kind == "category":
        return sum(value == categories[0] for value in values) / len(values)
    numbers = sorted(float(value) for value in values)
    return numbers[len(numbers) // 2] if kind == "number" else sum(numbers) / len(numbers)


def _histogram(kind: FeatureKind, before: Column, now: Column, categories: Sequence[str]) -> tuple[DriftBin, ...]:
    """By the tenths of the reference, for numbers; else a bar for each value."""
    first, second = ([value for _, value in column] for column in (before, now))
    if kind == "number":
        ordered = sorted(float(value) for value in first)
        edges = sorted({ordered[len(ordered) * number // BINS] for number in range(1, BINS)})
        labels = _labels(edges)
        counts = [
            Counter(sum(float(value) >= edge for edge in edges) for value in values) for values in (first, second)
        ]
        keys: Sequence[object] = range(len(labels))
    else:
        keys = categories[:BINS] if kind == "category" else [0.0, 1.0]
        labels = list(categories[:BINS]) if kind == "category" else ["no", "yes"]
        counts = [Counter(values) for values in (first, second)]  # type: ignore[arg-type]
    return tuple(
        DriftBin(label, counts[0][key] / len(first), counts[1][key] / len(second))  # type: ignore[index]
        for label, key in zip(labels, keys, strict=True)
    )


def _labels(edges: Sequence[float]) -> list[str]:
    if not edges:
        return ["all"]
    between = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    return [f"below {edges[0]:.3g}", *between, f"from {edges[-1]:.3g}"]


def _psi(bins: Sequence[DriftBin], first: int, second: int) -> float:
    """The population stability index, half a request added to each bar so that an empty one is not infinite."""
    parts = len(bins)
    shares = [
        ((each.reference * first + 0.5) / (first + parts / 2), (each.current * second + 0.5) / (second + parts / 2))
        for each in bins
    ]
    return sum((new - old) * math.log(new / old) for old, new in shares)
