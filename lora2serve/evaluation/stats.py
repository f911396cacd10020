"""Statistics of scores on the same items: intervals, tests, and what so many items can show.

An item is the unit, not a token; where items belong together (questions on one document) their group is. Every draw
is from a fixed seed: the same scores give the same verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.parity_check.metrics import CONFIDENCE, Estimate
from lora2serve.training.student_t import student_t

Floats = NDArray[np.float64]
Groups = Sequence[Hashable]
Verdict = Literal["better", "worse", "no difference", "not enough items"]
GateVerdict = Literal["met", "missed", "not enough items"]

ALPHA = 1 - CONFIDENCE
POWER = 0.8  # with which the smallest effect is shown
MARGIN = 0.01  # a difference within it is none
RESAMPLES = 4000
ENTRIES = 1 << 20  # groups x resamples that are drawn at once
FEWEST = 10  # groups, of which a bootstrap says something
ONE_SIDED, TWO_SIDED = CONFIDENCE, 1 - ALPHA / 2  # the quantiles that bound an interval of 95 %
FEWEST_CHANGES = 6  # of 0/1 scores, all the same way, that the exact test shows: 2 / 2**6 < 0.05


class _Ends(NamedTuple):
    low: float
    high: float
    lower: float
    upper: float


@dataclass(frozen=True)
class PairedDifference(JsonRecord):
    """The mean score of ``new`` less that of ``old`` on the same items.

    ``low`` and ``high`` are the ends of its 95 % interval, ``lower`` and ``upper`` those of the one-sided ones.
    ``p`` is two-sided: the exact McNemar test where all scores are 0 or 1 and no items are grouped, else that of
    flipped signs (a group's difference is as likely one way as the other). ``smallest`` is the smallest difference
    that so many items show, with a power of 0.8, infinite for too few groups; ``won`` and ``lost`` count the items
    whose score rose and fell.
    """

    WHOLE: ClassVar[bool] = True

    value: float
    low: float
    high: float
    lower: float
    upper: float
    p: float
    won: int
    lost: int
    items: int
    groups: int
    smallest: float
    higher_is_better: bool = True

    def verdict(self, margin: float = MARGIN, p: float | None = None) -> Verdict:
        """Which is better, at a level of 5 %; ``p`` is the p-value adjusted for other tests, if there are any.

        "no difference" is a finding, too: no item changed, or the interval lies within ``margin`` on both sides.
        """
        if (self.p if p is None else p) <= ALPHA:
            return "better" if (self.value > 0) == self.higher_is_better else "worse"
        unchanged = self.won == self.lost == 0 and self.groups >= FEWEST
        if unchanged or (-margin <= self.low and self.high <= margin):
            return "no difference"
        return "not enough items"

    def gate(self, margin: float) -> GateVerdict:
        """Whether ``new`` is shown to be worse by ``margin`` at most, or by more; one-sided, at a level of 5 %."""
        worst, best = (self.lower, self.upper) if self.higher_is_better else (-self.upper, -self.lower)
        return _judged(worst, best, -margin)

    def items_needed(self, margin: float) -> int:
        """How many items like these show, with a power of 0.8, that two equal models differ by ``margin`` at most.

        Where none of them changed, how often others will is not known: the fewest that could show it.
        """
        if self.won == self.lost == 0:
            return fewest_items(margin)
        z = _normal(ONE_SIDED)
        spread = self.items * (self.smallest / (_normal(TWO_SIDED) + _normal(POWER))) ** 2
        return max(math.ceil((z + _normal(POWER)) ** 2 * spread / margin**2), fewest_items(margin))


def paired(
    old: ArrayLike, new: ArrayLike, groups: Groups | None = None, *, higher_is_better: bool = True, seed: int = 0
) -> PairedDifference:
    """Compare (n,) scores with (n,) scores of the same items; ``groups`` has what each item belongs to.

    0/1 scores without groups: Tango's score interval (Statistics in Medicine 17, 1998). All others: the bootstrap of
    whole groups, its percentiles widened for few groups (Hesterberg, The American Statistician 69, 2015). Fewer than
    ``FEWEST`` groups have no interval: its ends are infinite. ValueError where the two have not the same length.
    """
    before, after = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"scores of shape {before.shape} and {after.shape}, expected the same items, one at least")
    difference = after - before
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    units = _units(difference, groups)
    exact = groups is None and is_binary(before) and is_binary(after)
    if exact:
        ends = _Ends(*_tango(won, lost, len(before), TWO_SIDED), *_tango(won, lost, len(before), ONE_SIDED))
        p, floor = mcnemar(lost, won), FEWEST_CHANGES / len(before)
    else:
        ends = _bootstrap(units, seed)
        p, few = _flipped_signs(units[:, 0], seed), len(units) < FEWEST_CHANGES
        floor = math.inf if few else FEWEST_CHANGES / len(before) if is_binary(before) and is_binary(after) else 0.0
    shown = (_normal(TWO_SIDED) + _normal(POWER)) * _standard_error(units)
    return PairedDifference(
        value=float(difference.mean()), low=ends.low, high=ends.high, lower=ends.lower, upper=ends.upper, p=p, won=won,
        lost=lost, items=len(before), groups=len(units), smallest=max(shown, floor), higher_is_better=higher_is_better,
    )  # fmt: skip


def mean(scores: ArrayLike, groups: Groups | None = None, *, level: float = TWO_SIDED, seed: int = 0) -> Estimate:
    """The mean of (n,) scores with its interval: Wilson's for 0/1 scores without groups, else as ``paired``.

    ``level`` is the quantile that bounds it on either side, 0.975 for an interval of 95 %.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores of shape {values.shape}, expected one at least")
    value = float(values.mean())
    if groups is None and is_binary(values):
        return Estimate(value, *_wilson(value, len(values), _normal(level)))
    ends = _bootstrap(_units(values, groups), seed)
    return Estimate(value, *((ends.low, ends.high) if level == TWO_SIDED else (ends.lower, ends.upper)))


def gate_of_mean(
    scores: ArrayLike, bound: float, groups: Groups | None = None, *, higher_is_better: bool = True
) -> GateVerdict:
    """Whether the mean is shown to be ``bound`` at least, or less (at most, where lower is better); one-sided."""
    estimate = mean(scores, groups, level=ONE_SIDED)
    if higher_is_better:
        return _judged(estimate.low, estimate.high, bound)
    return _judged(-estimate.high, -estimate.low, -bound)


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value: of the items that changed, either way is as likely (McNemar 1947; binomial)."""
    changed, fewer = lost + won, min(lost, won)
    term = total = 1
    for count in range(fewer):
        term = term * (changed - count) // (count + 1)
        total += term
    return min(1.0, 2 * total / (1 << changed))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that one false finding in all is as rare as in one (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def fewest_items(slack: float) -> int:
    """How many 0/1 scores of which none is wrong, or differs, show that less than ``slack`` of them are or do."""
    return math.ceil(_normal(ONE_SIDED) ** 2 * (1 - slack) / slack)


def items_for_share(share: float, bound: float) -> int:
    """How many 0/1 scores of that ``share`` show that it is on its side of ``bound``: Wilson's interval ends there."""
    return math.ceil(_normal(ONE_SIDED) ** 2 * bound * (1 - bound) / (share - bound) ** 2)


def smallest_effect(items: int, changed: float) -> float:
    """The smallest difference of 0/1 scores that ``items`` show with a power of 0.8; ``changed``: the share that does.

    Never less than what the exact test needs at all: six items that all change the same way.
    """
    shown = (_normal(TWO_SIDED) + _normal(POWER)) * math.sqrt(changed / items)
    return max(shown, FEWEST_CHANGES / items)


def _judged(worst: float, best: float, bound: float) -> GateVerdict:
    return "met" if worst >= bound else "missed" if best < bound else "not enough items"


def is_binary(values: ArrayLike) -> bool:
    """Whether all are right or wrong: 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def _normal(quantile: float) -> float:
    return statistics.NormalDist().inv_cdf(quantile)


def _units(values: Floats, groups: Groups | None) -> Floats:
    """(G, 2): the sum of each group's values, and how many they are."""
    if groups is None:
        return np.stack([values, np.ones_like(values)], axis=1)
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups of {len(values)} items")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    place = np.array([numbers[group] for group in groups])
    return np.stack([np.bincount(place, values), np.bincount(place)], axis=1)


def _standard_error(units: Floats) -> float:
    """Of a ratio of sums, linearized; infinite for one group."""
    count, (total, weight) = len(units), units.sum(axis=0)
    if count < 2:
        return math.inf
    apart = units[:, 0] - total / weight * units[:, 1]
    return float(math.sqrt(count / (count - 1) * (apart**2).sum()) / weight)


def _bootstrap(units: Floats, seed: int) -> _Ends:
    """The ends of the two-sided interval of the mean, and of the one-sided ones."""
    count = len(units)
    if count < FEWEST:
        return _Ends(-math.inf, math.inf, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    totals, sizes = units.T.copy()  # each by itself: numpy sums pairs six times as slowly
    drawn = (rng.integers(count, size=(part, count)) for part in _parts(count))
    single = bool((sizes == 1).all())  # of which any so many are as many items
    means = np.concatenate([
        totals[those].sum(axis=1) / (count if single else sizes[those].sum(axis=1)) for those in drawn
    ])  # fmt: skip
    ends: list[float] = []
    for level in (TWO_SIDED, ONE_SIDED):
        tail = statistics.NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_t(count - 1, level))
        ends += [float(end) for end in np.quantile(means, [tail, 1 - tail])]
    return _Ends(*ends)


def _parts(count: int) -> list[int]:
    """Resamples at a time, of so many groups each: they are held in memory."""
    most = max(1, ENTRIES // max(1, count))
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]


def _flipped_signs(sums: Floats, seed: int) -> float:
    """How often the sum is as far from 0 as it is, if each group's sign were the other as likely."""
    sizes = np.abs(sums[sums != 0])
    rng = np.random.default_rng(seed)
    bound, reached = abs(float(sums.sum())) * (1 - 1e-9), 0
    for part in _parts(len(sizes)):
        signs = rng.integers(2, size=(part, len(sizes)), dtype=np.int8) * np.float32(2) - np.float32(1)
        reached += int((np.abs(signs @ sizes) >= bound).sum())
    return (reached + 1) / (RESAMPLES + 1)


def _wilson(share: float, count: int, z: float) -> tuple[float, float]:
    middle, width = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def _tango(won: int, lost: int, count: int, level: float) -> tuple[float, float]:
    """The differences of two shares that the score test of paired items does not refuse."""
    z = _normal(level)

    def refused(difference: float, sign: int) -> bool:
        a = 2 * count
        b = -won - lost + (a - won + lost) * difference
        c = -lost * difference * (1 - difference)
        fewer = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = count * (2 * fewer + difference * (1 - difference))
        return sign * (won - lost - count * difference) > z * math.sqrt(max(0.0, variance))

    estimate = (won - lost) / count
    return _edge(-1.0, estimate, lambda value: refused(value, 1)), -_edge(-1.0, -estimate, lambda v: refused(-v, -1))


def _edge(refused: float, accepted: float, is_refused: Callable[[float], bool]) -> float:
    """Where one begins, by halving."""
    for _ in range(34):  # to 1e-10
        middle = (refused + accepted) / 2
        refused, accepted = (middle, accepted) if is_refused(middle) else (refused, middle)
    return accepted
