"""Evidence that may be looked at after each request: how often it is wrong, and how soon it is right.

"Worse" is simulated: what is not worse must not be stopped, at any look, in more than the share that was asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest

from lora2serve.evaluation.stats import mcnemar
from lora2serve.gateway.decisions.betting import STAKES, EProcess
from lora2serve.gateway.decisions.decision_rules import DecisionRecipe, DecisionRule
from lora2serve.gateway.decisions.rule_test import RuleTest, quantile
from lora2serve.gateway.decisions.trial import Trial, TrialVerdict

ALL = (DecisionRule("truth"), DecisionRule("errors"), DecisionRule("latency"))
GOOD, BAD = 0.9, 0.5  # how often an arm is right


def highest_e(differences: np.ndarray) -> np.ndarray:
    """(runs,): the largest e-value at any look, of (runs, looks) bets between -1 and 1; computed apart from the code."""
    wealth = np.stack([np.cumprod(1 + stake * differences, axis=1) for stake in STAKES])
    return wealth.mean(axis=0).max(axis=1)


def paired(rng: np.random.Generator, runs: int, looks: int, discordant: float, lost: float) -> np.ndarray:
    """+1 where the challenger lost a pair, -1 where it won, 0 for a tie."""
    signs = np.where(rng.random((runs, looks)) < lost, 1.0, -1.0)
    return signs * (rng.random((runs, looks)) < discordant)


@pytest.mark.parametrize(
    ("discordant", "runs_looks", "peeking"),
    [
        (0.1, (200, 1500), 60), (1.0, (200, 1500), 60),
        *(pytest.param(share, (400, 5000), 200, marks=pytest.mark.slow) for share in (0.1, 0.3, 1.0)),
    ],
)  # fmt: skip
def test_equal_arms_are_stopped_in_5_percent_at_most(
    discordant: float, runs_looks: tuple[int, int], peeking: int
) -> None:
    """Thousands of requests, a look after each; the control is a test for one look, which peeking makes wrong."""
    rng = np.random.default_rng(0)
    runs = paired(rng, *runs_looks, discordant, 0.5)
    assert (highest_e(runs) >= 20).mean() <= 0.05
    lost, won = (runs > 0).cumsum(axis=1), (runs < 0).cumsum(axis=1)
    looks = range(49, 1000, 50)
    peeked = [
        any(mcnemar(int(lost[run, look]), int(won[run, look])) <= 0.05 for look in looks) for run in range(peeking)
    ]
    assert np.mean(peeked) > 0.1


def test_worse_arms_are_found() -> None:
    rng = np.random.default_rng(1)
    assert (highest_e(paired(rng, 200, 2000, 0.1, 0.7)) >= 20).mean() >= 0.95
    assert (highest_e(paired(rng, 200, 2000, 0.1, 0.3)) >= 20).mean() == 0  # better is not worse


def test_the_process_is_the_formula() -> None:
    differences = paired(np.random.default_rng(2), 1, 300, 0.5, 0.6)
    process, largest = EProcess(1.0), 0.0
    for z in differences[0]:
        process.bet(float(z))
        largest = max(largest, math.exp(process.log_e))
    assert largest == pytest.approx(float(highest_e(differences)[0]), rel=1e-9)
    again = EProcess(1.0, process.wealth)
    assert again.log_e == process.log_e


def trial(rules: tuple[DecisionRule, ...] = ALL, *, share: float = 0.5, **settings: float) -> Trial:
    recipe = DecisionRecipe(rules=rules, **settings)  # type: ignore[arg-type]
    return Trial("medical-qa", 1, 2, recipe, mode="split", share=share, started="")


def traffic(
    seed: int, requests: int, right: dict[str, float], share: float = 0.5
) -> Iterator[tuple[str, float, float, float]]:
    """Arm, truth, error and seconds of each request, of arms that differ in truth alone; times have a heavy tail."""
    chance = random.Random(seed)
    for _ in range(requests):
        arm = "challenger" if chance.random() < share else "champion"
        yield (
            arm,
            float(chance.random() < right[arm]),
            float(chance.random() < 0.03),
            chance.lognormvariate(0, 1),
        )


def run(made: Trial, requests: Iterator[tuple[str, float, float, float]]) -> tuple[int, TrialVerdict] | None:
    """After how many requests there was a verdict."""
    for number, (arm, truth, error, seconds) in enumerate(requests, 1):
        unit = (str(number), str(number))
        for measure, value in (("truth", truth), ("errors", error), ("latency", seconds)):
            made.observe(measure, arm, value, unit=unit, at=0.0)  # type: ignore[arg-type]
        if verdict := made.verdict():
            return number, verdict
    return None


@pytest.mark.parametrize("runs", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_bad_adapter_at_half_is_rolled_back_within_200_requests(runs: int) -> None:
    found = [run(trial(), traffic(seed, 200, {"champion": GOOD, "challenger": BAD})) for seed in range(runs)]
    verdicts = [each[1] for each in found if each]
    assert len(verdicts) >= 0.95 * runs
    assert {(verdict.outcome, verdict.measure) for verdict in verdicts} == {("rollback", "truth")}
    assert "worse by truth: 0." in verdicts[0].why


@pytest.mark.parametrize(("runs", "requests"), [(20, 200), pytest.param(100, 1000, marks=pytest.mark.slow)])
def test_an_equal_adapter_at_half_is_left_alone(runs: int, requests: int) -> None:
    """All three rules at once, a look after each request."""
    equal = {"champion": GOOD, "challenger": GOOD}
    stopped = [run(trial(), traffic(seed, requests, equal)) for seed in range(runs)]
    assert sum(each is not None for each in stopped) <= 0.05 * runs


@pytest.mark.parametrize("runs", [5, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_other_shares(share: float, runs: int) -> None:
    """A few observations of one arm are compared with as many of the other as come for them."""
    bad = [
        run(trial(share=share), traffic(seed, 600, {"champion": GOOD, "challenger": BAD}, share))
        for seed in range(runs)
    ]
    assert sum(each is not None for each in bad) >= 0.95 * runs
    equal = {"champion": GOOD, "challenger": GOOD}
    stopped = [run(trial(share=share), traffic(seed, 600, equal, share)) for seed in range(runs // 2)]
    assert sum(each is not None for each in stopped) <= 0.05 * runs
    rule = RuleTest(DecisionRule("truth"), share)
    for arm, value, _, _ in traffic(0, 1000, equal, share):
        rule.observe(arm, value)  # type: ignore[arg-type]
    assert rule.bets > 70 and max(len(each.waiting) for each in rule.arms.values()) < 100


@pytest.mark.parametrize("runs", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_slower_by_more_than_it_may(runs: int) -> None:
    """Times are compared by their quantile, times what the rule lets pass; the control is a challenger within it."""
    for factor, expected in ((1.0, 0), (1.2, 0), (2.0, runs)):
        found = 0
        for seed in range(runs):
            made = trial((DecisionRule("latency", worse_by=0.25, quantile=0.5),))
            for number, (arm, _, _, seconds) in enumerate(traffic(seed, 1000, {"champion": 1, "challenger": 1})):
                slow = factor if arm == "challenger" else 1.0
                made.observe("latency", arm, slow * seconds, unit=("", str(number)), at=0.0)  # type: ignore[arg-type]
            found += made.log_e_worse >= math.log(20)
        assert abs(found - expected) <= 0.1 * runs, factor
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and quantile([1.0], 0.99) == 1.0


@pytest.mark.parametrize("runs", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_margins(runs: int) -> None:
    """What is worse by less than it may be is not stopped; what is worse by less than a margin is promoted, else not."""
    right = {"champion": 0.90, "challenger": 0.85}
    rules = (DecisionRule("truth", worse_by=0.15, promote_within=0.15),)
    verdicts = [run(trial(rules), traffic(seed, 4000, right)) for seed in range(runs)]
    assert [each[1].outcome for each in verdicts if each] == ["promote"] * runs
    strict = (DecisionRule("truth", worse_by=0.15, promote_within=0.0),)
    assert not any(run(trial(strict), traffic(seed, 500, right)) for seed in range(runs))
    both = (DecisionRule("truth", promote_within=0.1), DecisionRule("errors", promote_within=0.0))
    better = {"champion": 0.5, "challenger": 0.9}  # but no fewer errors: each rule that promotes must say so
    assert not any(run(trial(both), traffic(seed, 500, better)) for seed in range(runs))


def test_preferences_and_pairs() -> None:
    made = trial((DecisionRule("wins"), DecisionRule("errors"), DecisionRule("latency")))
    for number in range(30):
        unit = ("", str(number))
        made.observe_preference(-1.0, unit=unit, at=0.0)
        made.observe_pair("errors", 0.0, 0.0, unit=unit, at=0.0)
        made.observe_pair("latency", 1.0, 9.0, unit=unit, at=0.0)  # a copy waits: its time says nothing
    verdict = made.verdict()
    assert verdict and (verdict.measure, verdict.outcome) == ("wins", "rollback")
    assert [each.bets for each in made.evidence()] == [30, 30, 0]


def test_one_client_counts_once() -> None:
    """What one client asks is alike: a thousand failures of one are one. Without that, the control, they decide."""
    for hours, bets in ((24.0, 1), (0.0, 1000)):
        made = trial((DecisionRule("errors"),), client_hours=hours)
        for number in range(1000):
            made.observe("errors", "champion", 0.0, unit=("a", f"{number}a"), at=60.0 * number)
            made.observe("errors", "challenger", 1.0, unit=("b", f"{number}b"), at=60.0 * number)
        assert made.evidence()[0].bets == bets, hours
        assert (made.verdict() is not None) == (hours == 0)
    made = trial((DecisionRule("errors"),))
    for at in (0.0, 3600.0, 25 * 3600.0):
        made.observe("errors", "champion", 0.0, unit=("a", str(at)), at=at)
    assert len(made.rules["errors"].arms["champion"].waiting) == 2
    again = trial((DecisionRule("truth"),), client_hours=0.0)
    for _ in range(3):  # feedback that comes twice
        again.observe("truth", "champion", 1.0, unit=("", "one"), at=0.0)
    assert len(again.rules["truth"].arms["champion"].waiting) == 1
