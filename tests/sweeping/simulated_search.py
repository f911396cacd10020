"""A search without trainings: losses are a planted function of the point, with noise of rows and of trials."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.search_space import SearchPoint, SearchSpace
from lora2serve.sweeping.trial_record import FULL, RowLoss, TrialOutcome, TrialSpec

TARGETS = ("qv", "attention", "qv-mlp", "all-linear")
BASE_LOSS = 4.0
ROWS, TOKENS = 24, 10


@dataclass
class PlantedLoss:
    """Best at ``rate`` and ``targets``; a larger rank helps up to ``rank``, by ``for_rank`` each time it doubles."""

    rate: float
    targets: str
    rank: int
    seed: int = 0
    noise: float = 0.01
    for_rank: float = 0.12
    for_targets: float = 0.15
    settings: SearchSettings = field(default_factory=lambda: SearchSettings(base_loss=BASE_LOSS))

    def outcome(self, spec: TrialSpec) -> TrialOutcome:
        """What a trial reaches and takes: short ones stop early, and favor larger rates."""
        point = spec.point
        share = 1.0 if spec.level == FULL else self.settings.shares[spec.level]
        numbers = np.random.default_rng(zlib.crc32(f"{self.seed} {spec.key}".encode()))
        rows = np.random.default_rng(self.seed).gamma(4, 0.25, ROWS)
        away = math.log2(point.rate / self.rate) - (1 - share)
        missing = self.for_targets * abs(TARGETS.index(point.targets) - TARGETS.index(self.targets))
        missing += self.for_rank * max(0.0, math.log2(self.rank / point.rank))
        mean = 1.0 + 0.06 * away**2 + missing + 0.8 * (1 - share) ** 2
        sums = TOKENS * rows * mean * (1 + self.noise * numbers.standard_normal(ROWS))
        size = (TARGETS.index(point.targets) + 1) * point.rank
        return TrialOutcome(
            losses=RowLoss(tuple(sums.tolist()), (TOKENS,) * ROWS), run=spec.key,
            seconds=100 * share * (1 + 0.002 * size) * float(numbers.uniform(0.9, 1.1)), wall=100 * share,
            memory=10**9 + 10**6 * size, parameters=1000 * size,
        )  # fmt: skip


def searched(
    outcome: Callable[[TrialSpec], TrialOutcome], space: SearchSpace, settings: SearchSettings,
    choose: Callable[[SearchPlan], SearchPoint | None] = lambda plan: None, first: Sequence[SearchPoint] = (),
) -> SearchPlan:  # fmt: skip
    """The search when all is done; ``choose`` proposes points of a grid that is too large."""
    results: dict[str, TrialOutcome] = {}
    tried: dict[str, TrialSpec] = {}
    while True:
        plan = SearchPlan(space, settings, dict(results), dict(tried), first)
        step = plan.step()
        if step.phase == "done":
            return plan
        point = choose(plan) if step.to_choose and not step.trials else None
        for spec in [*step.trials, *([plan.spec(point, 0)] if point else [])]:
            assert spec.key not in tried
            tried[spec.key], results[spec.key] = spec, outcome(spec)
