"""One champion against one challenger, by all rules of a route; its state as a file has it.

The e-value of "worse by any rule" is the mean of the rules' e-values, which is one itself, however they hang together.
"Good enough" must be said by every rule that promotes, each by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.gateway.decisions.betting import log_mean
from lora2serve.gateway.decisions.decision_rules import TIMES, DecisionRecipe, Measure
from lora2serve.gateway.decisions.rule_test import RuleEvidence, RuleRecord, RuleTest, TestedArm

TrialMode = Literal["shadow", "split"]
Outcome = Literal["stop-shadow", "rollback", "promote"]
MOST_UNITS = 20_000  # whose last observation is known
Unit = tuple[str, str]  # whom a request is from, and which request it is


@dataclass(frozen=True)
class TrialRecord(JsonRecord):
    """A trial's state in a file. ``rules_sha256`` says by which rules: a trial by others begins anew."""

    WHOLE: ClassVar[bool] = True

    format: int
    name: str
    champion: int
    challenger: int
    rules_sha256: str
    started: str
    rules: tuple[RuleRecord, ...] = ()
    sequence: int = 0  # of the last entry that was taken
    units: Mapping[str, float] = field(default_factory=dict)  # measure and unit -> when one of its requests counted
    outcome: str = ""  # the verdict that was acted on


@dataclass(frozen=True)
class TrialVerdict:
    """What the rules say; ``log_e`` is the natural logarithm of the e-value that reached the bound."""

    outcome: Outcome
    name: str
    champion: int
    challenger: int
    measure: Measure
    log_e: float
    evidence: tuple[RuleEvidence, ...]

    @property
    def why(self) -> str:
        """In one line, for a log and for the registry's history."""
        rule = next(each for each in self.evidence if each.measure == self.measure)
        figures = f"{_shown(rule.challenger)} against {_shown(rule.champion)}"
        word = "good enough" if self.outcome == "promote" else "worse"
        return f"{word} by {self.measure}: {figures} in {rule.bets} comparisons, e-value {_power(self.log_e)}"


class Trial:
    """The test of version ``challenger`` against version ``champion`` of one name."""

    def __init__(
        self, name: str, champion: int, challenger: int, recipe: DecisionRecipe, *, mode: TrialMode, share: float,
        started: str, sequence: int = 0, record: TrialRecord | None = None,
    ) -> None:  # fmt: skip
        """``record`` is the state to go on from, which ``continues`` this trial; else it begins behind ``sequence``."""
        self.name, self.champion, self.challenger = name, champion, challenger
        self.recipe, self.mode, self.share = recipe, mode, share
        self.started = record.started if record else started
        states = record.rules if record else [None] * len(recipe.rules)
        self.rules: dict[Measure, RuleTest] = {
            rule.measure: RuleTest(rule, share, state) for rule, state in zip(recipe.rules, states, strict=True)
        }
        self._units: OrderedDict[str, float] = OrderedDict(record.units if record else {})
        self.sequence = record.sequence if record else sequence
        self.outcome = record.outcome if record else ""

    def arm(self, version: int) -> TestedArm | None:
        """Which arm a version is; None for one that is not tested."""
        arms: dict[int, TestedArm] = {self.challenger: "challenger", self.champion: "champion"}
        return arms.get(version)

    def observe(self, measure: Measure, arm: TestedArm, value: float, *, unit: Unit, at: float) -> None:
        """An observation of split traffic, at ``at`` in seconds since 1970."""
        if self._counts(measure, unit, at):
            self.rules[measure].observe(arm, value)

    def observe_pair(self, measure: Measure, champion: float, challenger: float, *, unit: Unit, at: float) -> None:
        """Both arms on the same request. Times of a copy, which waits behind the users' requests, are not compared."""
        if measure not in TIMES and self._counts(measure, unit, at):
            self.rules[measure].observe_pair(champion, challenger)

    def observe_preference(self, value: float, *, unit: Unit, at: float) -> None:
        """Which of two answers was preferred: 1 the challenger's, -1 the champion's, 0 neither."""
        if self._counts("wins", unit, at):
            self.rules["wins"].observe_preference(value)

    def evidence(self) -> tuple[RuleEvidence, ...]:
        """What each rule says now."""
        return tuple(rule.evidence() for rule in self.rules.values())

    @property
    def log_e_worse(self) -> float:
        """The natural logarithm of the e-value that the challenger is worse by any rule."""
        return log_mean([rule.worse.log_e for rule in self.rules.values()]) if self.rules else 0.0

    def verdict(self) -> TrialVerdict | None:
        """What to do; None while nothing is certain enough."""
        if not self.rules:
            return None
        bound, log_e_worse = -math.log(self.recipe.false_alarms), self.log_e_worse
        if log_e_worse >= bound:
            leading = max(self.rules.values(), key=lambda each: each.worse.log_e)
            outcome: Outcome = "stop-shadow" if self.mode == "shadow" else "rollback"
            return self._verdict(outcome, leading, log_e_worse)
        promoting = [(each, each.better.log_e) for each in self.rules.values() if each.better]
        if promoting and all(log_e >= bound for _, log_e in promoting):
            weakest, log_e = min(promoting, key=lambda pair: pair[1])
            return self._verdict("promote", weakest, log_e)
        return None

    def record(self) -> TrialRecord:
        """The state, as a file has it."""
        return TrialRecord(
            1, self.name, self.champion, self.challenger, rules_sha256(self.recipe), self.started,
            tuple(rule.record() for rule in self.rules.values()), self.sequence,
            dict(self._units), self.outcome,
        )  # fmt: skip

    def _verdict(self, outcome: Outcome, rule: RuleTest, log_e: float) -> TrialVerdict:
        measure = rule.rule.measure
        return TrialVerdict(outcome, self.name, self.champion, self.challenger, measure, log_e, self.evidence())

    def _counts(self, measure: Measure, unit: Unit, at: float) -> bool:
        """Whether a rule takes it: one observation of each unit in a while, or of each request."""
        if measure not in self.rules:
            return False
        sender, request = unit
        hours = self.recipe.client_hours
        key = f"{measure} {sender if hours and sender else request}"
        before = self._units.get(key)
        if before is not None and (not (hours and sender) or abs(at - before) < hours * 3600):
            return False  # a clock that was ahead for a while makes nobody's next request one of years to come
        self._units[key] = at
        self._units.move_to_end(key)
        if len(self._units) > MOST_UNITS:
            self._units.popitem(last=False)
        return True


def continues(record: TrialRecord, champion: int, challenger: int, recipe: DecisionRecipe) -> bool:
    """Whether a state is of this trial: of the same versions, by the same rules."""
    same = (record.champion, record.challenger) == (champion, challenger)
    return same and record.rules_sha256 == rules_sha256(recipe) and len(record.rules) == len(recipe.rules)


def rules_sha256(recipe: DecisionRecipe) -> str:
    """Of all that a verdict depends on."""
    rules = {key: value for key, value in asdict(recipe).items() if key != "webhook"}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.3g}"


def _power(log_e: float) -> str:
    return f"{math.exp(log_e):.0f}" if log_e < 14 else f"1e{log_e / math.log(10):.0f}"
