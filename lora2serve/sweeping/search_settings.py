"""How a sweep searches: its rungs, seeds, margin and budget."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.errors import UsageError

SHARES = (1 / 9, 1 / 3, 1.0)  # of the steps, at each rung
FEWEST_STEPS = 3  # of a rung: fewer say nothing
MARGIN = 0.01  # a change of the loss that is none, as a share
SEEDS = 3  # of each point in the last phase
EXPLORED = 0.6  # of a budget, for the first two phases
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class SearchSettings(JsonRecord):
    """``base_loss``: of the base on the rows of the search. A budget is of trials, or of seconds of all trials
    together, or there is none."""

    WHOLE: ClassVar[bool] = True

    base_loss: float
    shares: tuple[float, ...] = SHARES
    seed: int = 42
    alpha_per_rank: float = 2.0  # of every rank, so that a larger one is no larger step
    margin: float = MARGIN
    trials: int | None = None
    seconds: float | None = None

    @property
    def last_level(self) -> int:
        """The rung that takes all steps."""
        return len(self.shares) - 1

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the last phase."""
        return tuple(range(self.seed, self.seed + SEEDS))

    @property
    def exploring_trials(self) -> int | None:
        """Trials of the first two phases at most."""
        return None if self.trials is None else max(1, min(round(EXPLORED * self.trials), self.trials - SEEDS))

    @property
    def exploring_seconds(self) -> float | None:
        """Seconds of them at most."""
        return None if self.seconds is None else EXPLORED * self.seconds

    @property
    def first_points(self) -> int | None:
        """Points of the first rung at most; None for the whole grid."""
        explored = self.exploring_trials
        if explored is None:
            return None
        after = sum(self.shares[0] / share for share in self.shares[1:])  # trials of later rungs, for each first one
        return max(2, round((explored - min(explored // 3, 4)) / (1 + after)))


def rungs(steps: int) -> tuple[float, ...]:
    """Shares of ``steps`` that are worth a rung."""
    return tuple(share for share in SHARES if share == 1.0 or round(share * steps) >= FEWEST_STEPS)


def read_budget(text: str | int | None) -> tuple[int | None, float | None]:
    """``40`` trials, or ``6h``, ``90m``, ``1d`` as seconds; UsageError for anything else."""
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|d|trials)?\s*", str(text))
    number = float(match[1]) if match else 0.0
    unit = match[2] or "trials" if match else ""
    if unit in UNITS and number > 0:
        return None, number * UNITS[unit]
    if unit == "trials" and number.is_integer() and number >= SEEDS + 1:
        return int(number), None
    raise UsageError(f"--budget {text}: expected at least {SEEDS + 1} trials, or a time", "such as 40, 90m or 6h")
