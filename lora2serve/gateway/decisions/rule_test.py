"""One rule on a stream: the observations of two arms become bets.

Of a shadow copy, both arms answered the same request, which is one bet. Of split traffic each request has one arm: some
observations of the champion and some of the challenger, in the order in which they came, are one bet on the difference
of their means; how many of each follows from the share, so that those of one arm do not wait long for the other's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.gateway.decisions.betting import EProcess
from lora2serve.gateway.decisions.decision_rules import TIMES, DecisionRule, Measure

TestedArm = Literal["champion", "challenger"]
ARMS: tuple[TestedArm, ...] = ("champion", "challenger")
MOST_WAITING = 1000  # observations of one arm without their counterpart; then the oldest go
RECENT = 200  # times of each arm by which quantiles are taken
ENOUGH = 20  # times of the champion before its quantile is one
MOST_PER_BET = 20  # observations of one arm in one bet


@dataclass(frozen=True)
class ArmRecord(JsonRecord):
    """What a rule has of one arm."""

    count: int = 0
    total: float = 0.0  # of all values that were bet on
    waiting: tuple[float, ...] = ()
    recent: tuple[float, ...] = ()


@dataclass(frozen=True)
class RuleRecord(JsonRecord):
    """A rule's state in a file; ``worse`` and ``better`` are the wealth of the gamblers."""

    WHOLE: ClassVar[bool] = True

    measure: str
    bets: int = 0
    worse: tuple[float, ...] = ()
    better: tuple[float, ...] = ()
    champion: ArmRecord = ArmRecord()
    challenger: ArmRecord = ArmRecord()


@dataclass(frozen=True)
class RuleEvidence:
    """What a rule says now. Figures are means, or the rule's quantile in seconds; None where nothing was compared."""

    measure: Measure
    bets: int
    champion: float | None
    challenger: float | None
    log_e_worse: float
    log_e_better: float | None  # None: this rule promotes nothing


class _ArmState:
    def __init__(self, record: ArmRecord) -> None:
        self.count, self.total = record.count, record.total
        self.waiting = deque(record.waiting, MOST_WAITING)
        self.recent = deque(record.recent, RECENT)

    def take(self, number: int) -> list[float]:
        return [self.waiting.popleft() for _ in range(number)]

    def add(self, values: Sequence[float]) -> None:
        self.count += len(values)
        self.total += sum(values)
        self.recent.extend(values)

    def record(self, times: bool) -> ArmRecord:
        return ArmRecord(self.count, self.total, tuple(self.waiting), tuple(self.recent) if times else ())


class RuleTest:
    """Whether the challenger is worse, or good enough, by one rule.

    A value is of truth a score from 0 to 1, of wins 1, 0 or -1 as the challenger won, of errors 1 or 0, of times
    seconds. ``share`` is the challenger's part of the split traffic, 0 to 1.
    """

    def __init__(self, rule: DecisionRule, share: float, record: RuleRecord | None = None) -> None:
        self.rule, self.times = rule, rule.measure in TIMES
        record = record or RuleRecord(rule.measure)
        within = rule.promote_within
        self.worse = EProcess(1.0 if self.times else 1.0 + rule.worse_by, record.worse)
        self.better = (
            None if within is None else EProcess(1.0 if self.times else max(1e-6, 1.0 - within), record.better)
        )
        self.bets = record.bets
        self.arms: dict[TestedArm, _ArmState] = {
            "champion": _ArmState(record.champion),
            "challenger": _ArmState(record.challenger),
        }
        self._per_bet = _per_bet(share)

    def observe(self, arm: TestedArm, value: float) -> None:
        """An observation of split traffic."""
        self.arms[arm].waiting.append(value)
        while all(len(self.arms[each].waiting) >= self._per_bet[each] for each in ARMS):
            champion, challenger = (self.arms[each].take(self._per_bet[each]) for each in ARMS)
            self._bet(champion, challenger)

    def observe_pair(self, champion: float, challenger: float) -> None:
        """Both arms on the same request."""
        self._bet([champion], [challenger])

    def observe_preference(self, value: float) -> None:
        """Which of two answers was preferred: 1 the challenger's, -1 the champion's, 0 neither."""
        self._bet([0.0], [value])

    def evidence(self) -> RuleEvidence:
        """What is known now."""
        champion, challenger = (self._figure(self.arms[arm]) for arm in ARMS)
        better = self.better.log_e if self.better else None
        return RuleEvidence(self.rule.measure, self.bets, champion, challenger, self.worse.log_e, better)

    def record(self) -> RuleRecord:
        """The state, as a file has it."""
        champion, challenger = (self.arms[arm].record(self.times) for arm in ARMS)
        better = tuple(self.better.wealth) if self.better else ()
        return RuleRecord(self.rule.measure, self.bets, tuple(self.worse.wealth), better, champion, challenger)

    def _bet(self, champion: Sequence[float], challenger: Sequence[float]) -> None:
        if self.times:
            self._bet_on_times(champion, challenger)
        else:
            difference = self._badness(challenger) - self._badness(champion)
            self.worse.bet(difference - self.rule.worse_by)
            if self.better:
                self.better.bet((self.rule.promote_within or 0.0) - difference)
            self.bets += 1
        for arm, values in zip(ARMS, (champion, challenger), strict=True):
            self.arms[arm].add(values)

    def _bet_on_times(self, champion: Sequence[float], challenger: Sequence[float]) -> None:
        """On how many exceed the champion's quantile, as it was before this bet, times what the rule lets pass.

        Where the challenger's times are at most the champion's, times that, it exceeds it no more often. Times of
        requests that failed are none.
        """
        before = self.arms["champion"].recent
        if len(before) < ENOUGH:
            return
        edge = quantile(before, self.rule.quantile)
        usual = _above(champion, edge)
        self.worse.bet(_above(challenger, edge * (1 + self.rule.worse_by)) - usual)
        if self.better:
            self.better.bet(usual - _above(challenger, edge * (1 + (self.rule.promote_within or 0.0))))
        self.bets += 1

    def _badness(self, values: Sequence[float]) -> float:
        mean = fmean(values)
        return mean if self.rule.measure == "errors" else -mean if self.rule.measure == "wins" else 1.0 - mean

    def _figure(self, arm: _ArmState) -> float | None:
        if self.times:
            return quantile(arm.recent, self.rule.quantile) if arm.recent else None
        return arm.total / arm.count if arm.count else None


def quantile(values: Sequence[float] | deque[float], which: float) -> float:
    """The smallest value that at least that part of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(which * len(ordered)) - 1)]


def _above(values: Sequence[float], edge: float) -> float:
    return fmean(value > edge for value in values)


def _per_bet(share: float) -> dict[TestedArm, int]:
    """How many of each arm are one bet: as many as come for one of the rarer arm."""
    if not 0 < share < 1:
        return {"champion": 1, "challenger": 1}
    often = min(MOST_PER_BET, max(1, round(max(share, 1 - share) / min(share, 1 - share))))
    return {"champion": often, "challenger": 1} if share <= 0.5 else {"champion": 1, "challenger": often}
