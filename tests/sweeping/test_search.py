"""The search by itself, on losses that are planted: what it finds, where it stops, what it says."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from lora2serve.errors import UsageError
from lora2serve.sweeping.constraint_choice import choose
from lora2serve.sweeping.explored import Explored, explored
from lora2serve.sweeping.finalists import finalists
from lora2serve.sweeping.optuna_points import importances, propose
from lora2serve.sweeping.pareto import front, hypervolume, normalized
from lora2serve.sweeping.rank_steps import loss_change
from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_settings import SearchSettings, read_budget, rungs
from lora2serve.sweeping.search_space import SearchPoint, SearchSpace
from lora2serve.sweeping.trial_record import FULL, Objectives, RowLoss, TrialOutcome, TrialSpec
from tests.sweeping.simulated_search import BASE_LOSS, TARGETS, PlantedLoss, searched

SPACE, SETTINGS = SearchSpace(), SearchSettings(base_loss=BASE_LOSS)


def recommended(plan: SearchPlan, constraint: str = "quality") -> SearchPoint:
    return choose(finalists(plan), constraint, BASE_LOSS, 0.01, plan.rank_steps).finalist.point  # type: ignore[arg-type]


def near(point: SearchPoint, planted: PlantedLoss) -> bool:
    """Within one step of the grid in rate and rank, and of the same layers."""
    steps = abs(math.log2(point.rate / planted.rate)), abs(math.log2(point.rank / planted.rank))
    return max(steps) < 1.01 and point.targets == planted.targets


@pytest.mark.parametrize("seeds", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_planted_optimum_is_recommended(seeds: int) -> None:
    """In 95 of 100 seeds at least; the control, which takes the first rung's best rate at the first rank, is not."""
    good = control = 0
    for seed in range(seeds):
        draw = random.Random(seed)
        rate, targets, rank = draw.choice(SPACE.rates), draw.choice(TARGETS), draw.choice(SPACE.ranks)
        planted = PlantedLoss(rate, targets, rank, seed)
        plan = searched(planted.outcome, SPACE, SETTINGS)
        good += near(recommended(plan), planted)
        control += near(plan.ranked(0)[0], planted)
    assert good >= 0.95 * seeds
    assert control < 0.8 * seeds


def test_flat_ranks_recommend_the_smallest_and_name_the_interval() -> None:
    planted = PlantedLoss(2e-4, "all-linear", 8, noise=0.004)
    plan = searched(planted.outcome, SPACE, SETTINGS)
    choice = choose(finalists(plan), "quality", BASE_LOSS, 0.01, plan.rank_steps)
    assert choice.finalist.point.rank == 8
    (step,) = [step for step in plan.rank_steps if step.targets == "all-linear"]
    assert (step.rank, step.larger, step.verdict) == (8, 16, "flat") and -0.01 <= step.change.low <= step.change.high
    assert f"Rank 8 to 16 on all-linear: loss {step.change.words}: flat." in choice.reason
    assert {spec.point.rank for spec in plan.tried.values() if spec.point.targets == "all-linear"} == {8, 16}
    steep = searched(PlantedLoss(2e-4, "all-linear", 64).outcome, SPACE, SETTINGS)
    assert recommended(steep).rank == 64, "the control"
    assert [s.verdict for s in steep.rank_steps if s.targets == "all-linear"][:3] == ["gain"] * 3


@pytest.mark.parametrize(("rate", "beyond"), [(2.5e-5, 2.5e-5), (3.2e-3, 3.2e-3), (6.4e-3, 6.4e-3)])
def test_an_edge_widens_the_range(rate: float, beyond: float) -> None:
    plan = searched(PlantedLoss(rate, "qv", 8, noise=0.002).outcome, SPACE, SETTINGS)
    assert beyond in plan.widened and recommended(plan).rate == pytest.approx(rate)
    assert not plan.at_edge
    inner = searched(PlantedLoss(2e-4, "qv", 8, noise=0.002).outcome, SPACE, SETTINGS)
    assert inner.widened == () and recommended(inner).rate == 2e-4, "the control"


def test_a_range_is_not_widened_for_ever() -> None:
    plan = searched(PlantedLoss(1.0, "qv", 8).outcome, SPACE, SETTINGS)
    assert max(plan.widened) == pytest.approx(1.6e-3 * 16) and "is the largest that was tried" in plan.at_edge
    assert not explored(plan).enough and "largest that was tried" in explored(plan).words


def test_ranks_go_on_beyond_the_largest_that_was_named() -> None:
    plan = searched(PlantedLoss(2e-4, "qv", 256).outcome, SPACE, SETTINGS)
    assert {128, 256} <= {spec.point.rank for spec in plan.tried.values()}
    assert recommended(plan).rank == 256 and "largest rank" in plan.at_edge


def test_front_equals_brute_force() -> None:
    numbers = np.random.default_rng(0)
    for count, figures in itertools.product((1, 7, 40), (1, 2, 3, 5)):
        points = [tuple(point) for point in numbers.integers(0, 5, (count, figures)).tolist()]
        brute = [
            n for n, p in enumerate(points)
            if not any(all(a <= b for a, b in zip(q, p, strict=True)) and (q != p or m < n) and m != n
                       for m, q in enumerate(points))
        ]  # fmt: skip
        assert front(points) == brute


def test_hypervolume_equals_a_count_of_cells() -> None:
    numbers = np.random.default_rng(1)
    for figures in (1, 2, 3, 4):
        points = [tuple(point) for point in numbers.integers(0, 6, (9, figures)).tolist()]
        cells = itertools.product(range(6), repeat=figures)
        covered = sum(any(all(a <= c for a, c in zip(p, cell, strict=True)) for p in points) for cell in cells)
        assert hypervolume(points, (6,) * figures) == covered
    assert hypervolume([(6, 0)], (6, 6)) == 0
    assert normalized([(1, 5), (3, 5)]) == [(0.0, 0.0), (1.0, 0.0)]


def test_each_constraint_gets_its_own() -> None:
    """Where larger is better, memory takes a smaller one that keeps 90 % of the gain, and says how much it keeps."""
    planted = PlantedLoss(2e-4, "all-linear", 32, for_rank=0.05, for_targets=0.05)
    plan = searched(planted.outcome, SPACE, SETTINGS)
    by_name = {name: choose(finalists(plan), name, BASE_LOSS, 0.01, plan.rank_steps) for name in ("quality", "memory")}
    quality, memory = by_name["quality"].finalist, by_name["memory"].finalist
    assert memory.objectives.memory < quality.objectives.memory
    assert BASE_LOSS - memory.losses.mean >= 0.9 * (BASE_LOSS - quality.losses.mean)
    assert "of the best one's gain over the base" in by_name["memory"].reason[1]


def test_what_does_not_fit_is_no_candidate() -> None:
    """Memory holds nothing but the smallest layers: all else is infeasible, and something is recommended still."""
    planted = PlantedLoss(2e-4, "all-linear", 16)

    def outcome(spec: TrialSpec) -> TrialOutcome:
        if spec.point.targets != "qv" or spec.point.rank > 16:
            return TrialOutcome("out of memory" if spec.point.targets == "attention" else "does not fit", "no room")
        return planted.outcome(spec)

    plan = searched(outcome, SPACE, SETTINGS)
    assert recommended(plan).targets == "qv" and recommended(plan).rank <= 16


def test_nothing_that_trains_ends_the_search() -> None:
    plan = searched(lambda spec: TrialOutcome("failed", "no"), SPACE, SETTINGS)
    assert plan.front == [] and len(plan.tried) == len(SPACE.grid())


def test_the_last_phase_has_three_seeds_and_all_rows() -> None:
    plan = searched(PlantedLoss(2e-4, "qv", 8).outcome, SPACE, SETTINGS)
    finals = [spec for spec in plan.tried.values() if spec.level == FULL]
    assert {spec.seed for spec in finals} == {42, 43, 44} and {spec.point for spec in finals} == set(plan.finalists)
    assert {spec.seed for spec in plan.tried.values() if spec.level != FULL} == {42}


@pytest.mark.parametrize("trials", [4, 10, 25, 40])
def test_a_budget_of_trials_is_kept(trials: int) -> None:
    """Points are spread and proposed where the grid is too large, and some are left for the last phase."""
    settings = replace(SETTINGS, trials=trials)
    planted = PlantedLoss(2e-4, "all-linear", 16, settings=settings)

    def proposed(plan: SearchPlan) -> SearchPoint | None:
        at_first = {spec.point: plan.objectives(spec.point, 0) for spec, _ in plan.finished_at(0)}
        return propose(SPACE, at_first, {}, 0)

    plan = searched(planted.outcome, SPACE, settings, proposed)
    assert trials // 2 < len(plan.tried) <= trials
    assert sum(spec.level == FULL for spec in plan.tried.values()) >= 3
    assert recommended(plan)


def test_a_budget_of_time_is_kept() -> None:
    settings = replace(SETTINGS, seconds=900.0)
    plan = searched(PlantedLoss(2e-4, "qv", 8, settings=settings).outcome, SPACE, settings)
    assert 900 <= sum(outcome.wall for outcome in plan.results.values()) <= 900 + 9 * 100
    assert explored(plan).budget_ended and not explored(plan).enough


def test_earlier_fronts_are_tried_first() -> None:
    first = [SearchPoint(6e-4, "qv-mlp", 16)]
    plan = SearchPlan(SPACE, SETTINGS, {}, {}, first)
    assert plan.step().trials[0].point == first[0] and len(plan.step().trials) == 25
    beyond = [SearchPoint(1e-5, "qv", 16)]
    planted = PlantedLoss(2e-4, "qv", 8, noise=0.0)
    plan = searched(planted.outcome, SPACE, SETTINGS, first=beyond)
    assert 1e-5 in {spec.point.rate for spec in plan.tried.values()} and plan.widened == (), "nothing was at an edge"


def test_explored_enough_is_a_figure() -> None:
    flat = searched(PlantedLoss(2e-4, "qv", 8, noise=0.0).outcome, SPACE, SETTINGS)
    figure = explored(flat)
    assert 0 <= figure.growth <= 1 and figure.words.startswith(("Explored enough", "Not explored enough"))
    assert figure.enough == (figure.growth < 0.01)


def test_few_trials_have_explored_nothing() -> None:
    """One that was trained to its end, where all others failed, has no last third that could have brought anything."""
    alone = Explored(growth=0.0, trials=1, at_edge="", budget_ended=False)
    assert not alone.enough and "1 finished with all steps of the search" in alone.words
    assert replace(alone, trials=3).enough, "the control"


def test_the_sampler_is_told_what_does_not_fit() -> None:
    """Of 20 proposals fewer go where memory ended a trial than without the word."""
    space = SearchSpace(rates=tuple(1e-5 * 1.5**n for n in range(16)), targets=("qv", "all-linear"), ranks=(16,))
    losses = {p: Objectives(2.0 - 0.5 * len(p.targets) / 10, 1, 1.0, 1, 0) for p in space.grid()[::5]}
    large = {point: value for point, value in losses.items() if point.targets == "all-linear"}
    small = {point: value for point, value in losses.items() if point.targets == "qv"}

    def share(known: dict[SearchPoint, Objectives], infeasible: dict[SearchPoint, Objectives]) -> int:
        points = [propose(space, known, infeasible, seed) for seed in range(20)]
        return sum(point is not None and point.targets == "all-linear" for point in points)

    assert small and large
    assert share(small, large) < share({**small, **large}, {}), "the second is the control"
    assert (
        propose(space, {point: losses.get(point, next(iter(losses.values()))) for point in space.grid()}, {}, 0) is None
    )


def test_importance_names_what_decides() -> None:
    points = [(point, 1.0 + math.log(point.rate / 2e-4) ** 2) for point in SPACE.grid()]
    shares = importances(points)
    assert shares["train.learning_rate"] > 0.8 and sum(shares.values()) == pytest.approx(1)
    by_layers = importances([(point, float(TARGETS.index(point.targets))) for point in SPACE.grid()])
    assert by_layers["train.lora.targets"] > 0.8, "the control"
    assert importances(points[:3]) == {}


def test_a_change_is_that_of_the_mean_over_tokens() -> None:
    old = RowLoss(tuple(float(n) for n in range(1, 31)), tuple(range(2, 32)))
    new = replace(old, sums=tuple(1.1 * total for total in old.sums))
    change = loss_change(old, new)
    assert change.value == pytest.approx(0.1) and change.low <= 0.1 <= change.high
    assert old.mean == pytest.approx(sum(old.sums) / sum(old.tokens)) == pytest.approx(np.mean(old.scores))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("40", (40, None)), ("40 trials", (40, None)), ("6h", (None, 21600.0)), ("1.5m", (None, 90.0))],
)
def test_budgets(text: str, expected: tuple[int | None, float | None]) -> None:
    assert read_budget(text) == expected


@pytest.mark.parametrize("text", ["", "3", "x", "-4", "0h", "4.5", "6 weeks"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--budget .*expected at least 4 trials"):
        read_budget(text)


def test_rungs_of_few_steps() -> None:
    assert rungs(900) == (1 / 9, 1 / 3, 1.0) and rungs(12) == (1 / 3, 1.0) and rungs(3) == (1.0,)
