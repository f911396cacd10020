"""Whether a larger rank, or another point, is better: the paired interval of both losses on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.evaluation.stats import PairedDifference, paired
from lora2serve.sweeping.search_space import SearchPoint
from lora2serve.sweeping.trial_record import RowLoss

StepVerdict = Literal["flat", "no gain", "gain", "not enough rows"]


@dataclass(frozen=True)
class LossChange(JsonRecord):
    """The loss of one point less that of another on the same rows, as a share of the other's; its 95 % interval."""

    WHOLE: ClassVar[bool] = True

    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """``-1.2 % (95 % interval -2.0 % to -0.3 %)``"""
        if not math.isfinite(self.low):
            return f"{100 * self.value:+.1f} % (too few rows for an interval)"
        return f"{100 * self.value:+.1f} % (95 % interval {100 * self.low:+.1f} % to {100 * self.high:+.1f} %)"


def loss_change(old: RowLoss, new: RowLoss) -> LossChange:
    """From ``old`` to ``new``; below zero is better."""
    difference = _paired(tuple(old.scores), tuple(new.scores))
    scale = old.mean or 1.0
    return LossChange(difference.value / scale, difference.low / scale, difference.high / scale)


@cache  # a sweep looks at its trials every second
def _paired(old: tuple[float, ...], new: tuple[float, ...]) -> PairedDifference:
    return paired(old, new, higher_is_better=False)


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
        return f"rank {self.rank} to {self.larger} on {self.targets}: loss {self.change.words}: {self.verdict}"


def rank_step(point: SearchPoint, old: RowLoss, larger: int, new: RowLoss, margin: float) -> RankStep:
    """From ``point`` to the same with a larger rank. ``margin``: a change of the loss that is none, as a share."""
    change = loss_change(old, new)
    if -margin <= change.low and change.high <= margin:
        verdict: StepVerdict = "flat"
    elif change.low >= -margin:
        verdict = "no gain"  # worse, or at best within the margin
    elif change.high < 0:
        verdict = "gain"
    else:
        verdict = "not enough rows"
    return RankStep(point.rank, larger, point.targets, change, verdict)
