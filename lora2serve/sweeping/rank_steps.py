"""Whether a larger rank, or another point, is better: the paired interval of both losses on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.evaluation.stats import FEWEST, PairedDifference, paired
from lora2serve.sweeping.search_space import SearchPoint
from lora2serve.sweeping.trial_record import RowLoss

StepVerdict = Literal["flat", "no gain", "gain", "not enough rows"]


@dataclass(frozen=True)
class LossChange(JsonRecord):
    """The loss of one point less that of another on the same rows, as a share of the other's; its 95 % interval.

    ``scored``: of a suite's scores, not as a share. ``same``: no row changed, of so many that this says something.
    """

    WHOLE: ClassVar[bool] = True

    value: float
    low: float
    high: float
    scored: bool = False
    same: bool = False

    def within(self, margin: float) -> bool:
        """Whether it is shown to be none."""
        return self.same or (-margin <= self.low and self.high <= margin)

    def no_worse(self, margin: float) -> bool:
        """Whether it is shown to be no worse than that."""
        return self.same or self.high <= margin

    @property
    def words(self) -> str:
        """``-1.2 % (95 % interval -2.0 % to -0.3 %)``; of scores, in points of them, more being better."""
        value, low, high = self.percent
        unit = " points" if self.scored else " %"
        if not math.isfinite(low):
            return f"{value:+.1f}{unit} (too few rows for an interval)"
        return f"{value:+.1f}{unit} (95 % interval {low:+.1f}{unit} to {high:+.1f}{unit})"

    @property
    def percent(self) -> tuple[float, float, float]:
        """The value and its interval as they are shown."""
        if self.scored:
            return -100 * self.value + 0.0, -100 * self.high + 0.0, -100 * self.low + 0.0
        return 100 * self.value, 100 * self.low, 100 * self.high


def loss_change(old: RowLoss, new: RowLoss) -> LossChange:
    """From ``old`` to ``new``; below zero is better."""
    difference = _paired(tuple(old.scores), tuple(new.scores), old.groups)
    scale = 1.0 if old.scored else old.mean or 1.0
    same = difference.won == difference.lost == 0 and difference.groups >= FEWEST
    return LossChange(
        difference.value / scale, difference.low / scale, difference.high / scale, scored=old.scored, same=same
    )


@cache  # a sweep looks at its trials every second
def _paired(old: tuple[float, ...], new: tuple[float, ...], groups: tuple[str, ...]) -> PairedDifference:
    return paired(old, new, groups or None, higher_is_better=False)


@dataclass(frozen=True)
class RankStep(JsonRecord):
    """What the next larger rank brought. ``verdict`` "flat" ends the search for a larger one."""

    WHOLE: ClassVar[bool] = True

    rank: int
    larger: int
    targets: str
    change: LossChange
    verdict: StepVerdict

    @property
    def ends(self) -> bool:
        """Whether no larger rank is worth a trial."""
        return self.verdict in ("flat", "no gain")

    @property
    def words(self) -> str:
        """In a sentence."""
        what = "score" if self.change.scored else "loss"
        return f"rank {self.rank} to {self.larger} on {self.targets}: {what} {self.change.words}: {self.verdict}"


def rank_step(point: SearchPoint, old: RowLoss, larger: int, new: RowLoss, margin: float) -> RankStep:
    """From ``point`` to the same with a larger rank. ``margin``: a change of the loss that is none, as a share."""
    change = loss_change(old, new)
    if change.within(margin):
        verdict: StepVerdict = "flat"
    elif change.low >= -margin:
        verdict = "no gain"  # worse, or at best within the margin
    elif change.high < 0:
        verdict = "gain"
    else:
        verdict = "not enough rows"
    return RankStep(point.rank, larger, point.targets, change, verdict)
