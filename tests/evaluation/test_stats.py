"""What the statistics say of scores whose truth is known, and scipy beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as oracle

from lora2serve.evaluation import stats
from lora2serve.evaluation.stats import Floats, holm, mcnemar, mean, paired
from lora2serve.training.student_t import student_t

Draw = Callable[[np.random.Generator], tuple[Floats, Floats]]


def answers(count: int, lost: float, won: float) -> Draw:
    """0/1 scores of two models, of which these shares of the items change."""

    def draw(rng: np.random.Generator) -> tuple[Floats, Floats]:
        fate = rng.choice(4, size=count, p=[lost, won, 0.7 * (1 - lost - won), 0.3 * (1 - lost - won)])
        return ((fate == 0) | (fate == 2)).astype(float), ((fate == 1) | (fate == 2)).astype(float)

    return draw


def figures(count: int, apart: float) -> Draw:
    """Scores that are no 0 and 1, far from normal."""

    def draw(rng: np.random.Generator) -> tuple[Floats, Floats]:
        old = rng.exponential(1.0, count)
        return old, 0.7 * old + 0.3 * rng.exponential(1.0, count) + apart

    return draw


def coverage(draw: Draw, truth: float, runs: int, groups: list[int] | None = None) -> float:
    """How often the interval has the true difference in it."""
    found = [paired(*draw(np.random.default_rng(seed)), groups) for seed in range(runs)]
    return float(np.mean([difference.low <= truth <= difference.high for difference in found]))


def draws(light: int, weekly: int) -> list[object]:
    """How many are drawn: as many as show a gross fault, and those that show a small one."""
    return [light, pytest.param(weekly, marks=pytest.mark.slow)]


def within_noise(found: float, share: float, draws: int) -> bool:
    """Whether so many draws of that share may come out so: three standard deviations."""
    return abs(found - share) <= 3 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize(("count", "lost", "won"), [(200, 0.05, 0.05), (200, 0.02, 0.1), (1000, 0.15, 0.1)])
@pytest.mark.parametrize("draws", draws(200, 1100))
def test_an_interval_of_answers_covers_the_truth(count: int, lost: float, won: float, draws: int) -> None:
    assert within_noise(coverage(answers(count, lost, won), won - lost, draws), 0.95, draws)


@pytest.mark.parametrize("count", [40, 100])
@pytest.mark.parametrize("draws", draws(150, 1100))
def test_an_interval_of_figures_covers_the_truth(count: int, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 400)
    assert within_noise(coverage(figures(count, 0.2), 0.2, draws), 0.95, draws)


@pytest.mark.parametrize("draws", draws(150, 1100))
def test_items_of_one_group_are_no_news(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 documents with 5 questions each, whose answers change together; the control takes them for 200 items."""
    monkeypatch.setattr(stats, "RESAMPLES", 400)
    groups = [item // 5 for item in range(200)]

    def draw(rng: np.random.Generator) -> tuple[Floats, Floats]:
        old, new = answers(40, 0.15, 0.15)(rng)
        return np.repeat(old, 5), np.repeat(new, 5)

    assert within_noise(coverage(draw, 0.0, draws, groups), 0.95, draws)
    assert coverage(draw, 0.0, draws // 3) < 0.8, "the control"


@pytest.mark.parametrize(("draws", "twentieth"), [(250, 0.07), pytest.param(600, 0.05, marks=pytest.mark.slow)])
def test_a_planted_loss_is_found_and_nothing_else(draws: int, twentieth: float) -> None:
    """5 points on 1,000 items: said in nine of ten draws; without one, in at most one of twenty."""
    worse = [paired(*answers(1000, 0.12, 0.07)(np.random.default_rng(seed))) for seed in range(draws)]
    same = [paired(*answers(1000, 0.1, 0.1)(np.random.default_rng(seed))) for seed in range(draws)]
    assert np.mean([found.verdict() == "worse" for found in worse]) >= 0.9
    assert np.mean([found.gate(0.01) != "met" for found in worse]) >= 0.99
    assert np.mean([found.verdict() in ("better", "worse") for found in same]) <= twentieth
    assert np.mean([found.gate(0.01) == "missed" for found in same]) <= twentieth


@pytest.mark.parametrize(("draws", "twentieth"), [(250, 0.08), pytest.param(600, 0.065, marks=pytest.mark.slow)])
def test_a_gate_lets_no_loss_through(draws: int, twentieth: float) -> None:
    """One as large as the margin passes in at most one of twenty draws; two equal models do where there is room."""
    at_margin = [paired(*answers(1000, 0.1, 0.05)(np.random.default_rng(seed))) for seed in range(draws)]
    assert np.mean([found.gate(0.05) == "met" for found in at_margin]) <= twentieth  # and the noise of so many
    same = [paired(*answers(2000, 0.05, 0.05)(np.random.default_rng(seed))) for seed in range(draws // 2)]
    assert np.mean([found.gate(0.05) == "met" for found in same]) >= 0.99
    needed = same[0].items_needed(0.02)
    enough = [paired(*answers(needed, 0.05, 0.05)(np.random.default_rng(seed))) for seed in range(draws // 2)]
    assert 0.7 <= np.mean([found.gate(0.02) == "met" for found in enough]) <= 0.9, "a power of 0.8"


@pytest.mark.parametrize("groups", [None, [item // 3 for item in range(200)]])
@pytest.mark.parametrize("draw", [answers(200, 0.1, 0.1), figures(200, 0.0)])
@pytest.mark.parametrize("draws", draws(20, 100))
def test_a_model_against_itself(
    draw: Draw, groups: list[int] | None, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 400)
    for seed in range(draws):
        old, new = draw(np.random.default_rng(seed))
        assert paired(old, old, groups, seed=seed).verdict() == "no difference"
    assert paired(old, new + 10, groups).verdict() == "better", "the control"


def test_not_enough_items() -> None:
    few = paired([1, 0, 1, 1, 0], [1, 1, 1, 0, 1])
    assert few.verdict() == few.gate(0.05) == "not enough items"
    assert few.smallest > 1, "not even if all five changed"
    assert paired([1.0, 1.0], [1.0, 1.0]).verdict() == "not enough items", "two equal answers are no proof"
    assert not math.isfinite(paired([0.5] * 9, [0.6] * 9).low)
    assert paired([0] * 6, [1] * 6).verdict() == "better", "six of six, and the control: five of five"
    assert paired([0] * 5, [1] * 5).verdict() == "not enough items"


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 6), (3, 1), (10, 25), (400, 350), (3000, 3200)])
def test_mcnemar(lost: int, won: int) -> None:
    expected = oracle.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-6) and mcnemar(lost, won) == mcnemar(won, lost)


def test_flipped_signs_are_as_the_exact_test() -> None:
    """Where both are of 0/1 scores: groups of one item are none."""
    old, new = answers(300, 0.05, 0.1)(np.random.default_rng(0))
    exact, drawn = paired(old, new), paired(old, new, list(range(300)))
    assert drawn.p == pytest.approx(exact.p, abs=0.015) and drawn.low == pytest.approx(exact.low, abs=0.006)
    old, new = figures(60, 0.05)(np.random.default_rng(0))
    assert paired(old, new).p == pytest.approx(oracle.ttest_rel(old, new).pvalue, abs=0.03)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    alone = 0
    for seed in range(400):
        p_values = np.random.default_rng(seed).uniform(size=20).tolist()
        alone += min(p_values) <= 0.05
        assert min(holm(p_values)) >= min(p_values)
    wrong = sum(min(holm(np.random.default_rng(seed).uniform(size=20).tolist())) <= 0.05 for seed in range(400))
    assert wrong / 400 <= 0.07 and alone / 400 > 0.5, "the control: unadjusted, one of twenty tests finds something"


def test_means() -> None:
    wilson = oracle.binomtest(180, 200).proportion_ci(method="wilson")
    assert mean([1] * 180 + [0] * 20) == stats.Estimate(0.9, pytest.approx(wilson.low), pytest.approx(wilson.high))
    assert mean([1] * 20).low == pytest.approx(0.8389, abs=1e-4), "all of twenty are no proof of all"
    values = np.random.default_rng(0).normal(3, 1, 50)
    low, high = oracle.t.interval(0.95, 49, values.mean(), values.std(ddof=1) / math.sqrt(50))
    assert mean(values).low == pytest.approx(low, abs=0.05) and mean(values).high == pytest.approx(high, abs=0.05)
    assert (
        stats.gate_of_mean([1] * 95 + [0] * 5, 0.9) == "met"
        and stats.gate_of_mean([1] * 60 + [0] * 40, 0.9) == "missed"
    )
    assert stats.gate_of_mean([1] * 9 + [0], 0.85) == "not enough items"
    assert stats.gate_of_mean([0.2] * 50, 0.3, higher_is_better=False) == "met"


def test_where_lower_is_better() -> None:
    old, new = np.full(50, 0.5), np.full(50, 0.4)
    assert paired(old, new, higher_is_better=False).verdict() == "better" and paired(old, new).verdict() == "worse"
    assert paired(old, new, higher_is_better=False).gate(0.0) == "met" and paired(old, new).gate(0.05) == "missed"


def test_few_groups_show_nothing() -> None:
    """Not "a difference of 0 points at least": six groups that change the same way are the fewest."""
    same = [1, 0] * 10
    assert paired(same, same, [0] * 20).smallest == paired(same, same, [n % 5 for n in range(20)]).smallest == math.inf
    assert paired(same, same, [n // 2 for n in range(20)]).smallest == pytest.approx(6 / 20)


@pytest.mark.parametrize("draws", draws(200, 500))
def test_the_smallest_effect(draws: int) -> None:
    """Planted, it is shown in eight of ten draws."""
    effect = stats.smallest_effect(1000, 0.2)
    assert effect == pytest.approx(2.8016 * math.sqrt(0.2 / 1000), rel=1e-3) and stats.smallest_effect(10, 0.0) == 0.6
    found = [
        paired(*answers(1000, 0.1 - effect / 2, 0.1 + effect / 2)(np.random.default_rng(seed))) for seed in range(draws)
    ]
    assert within_noise(float(np.mean([difference.p <= 0.05 for difference in found])), 0.8, draws)
    assert np.mean([difference.smallest for difference in found]) == pytest.approx(effect, rel=0.05)


def test_students_t() -> None:
    for freedom in (3, 9, 40):
        for level in (0.95, 0.975):
            assert student_t(freedom, level) == pytest.approx(oracle.t.ppf(level, freedom), rel=0.01)


@pytest.mark.parametrize(("old", "new"), [([], []), ([1], [1, 0]), ([[1]], [[0]])])
def test_scores_that_are_no_pairs(old: list[int], new: list[int]) -> None:
    with pytest.raises(ValueError, match="same items"):
        paired(old, new)
    with pytest.raises(ValueError, match="2 groups of 3"):
        paired([1, 0, 1], [0, 0, 1], ["a", "b"])
