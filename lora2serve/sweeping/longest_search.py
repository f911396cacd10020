"""How many trials a search can take: the search itself, on outcomes that let it stop nowhere early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lora2serve.evaluation.stats import FEWEST
from lora2serve.sweeping.search_plan import Phase, SearchPlan
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.search_space import SearchPoint, SearchSpace
from lora2serve.sweeping.trial_record import FULL, RowLoss, TrialOutcome, TrialSpec

BASE_LOSS = 1e9  # beside which all points gain about the same, so that none is left out for that


def most_trials(space: SearchSpace, settings: SearchSettings, jobs: int, first: int = 0) -> Mapping[Phase, int]:
    """Of each phase at most, in their order, with ``jobs`` at a time.

    A budget of trials leaves fewer, those that run when it is used up beside it; one of time ends them anywhere.

    first: how many points of earlier runs are tried first, at most; of any rates.
    """
    ways = [_most(space, settings, jobs, points) for points in _first(space, first)]
    return {phase: max(way[phase] for way in ways) for phase in ways[0]}


def _first(space: SearchSpace, count: int) -> Iterator[list[SearchPoint]]:
    """None; and so many below the range of rates, within it and above it, where no other point is."""
    yield []
    others = tuple((key, values[0]) for key, values in space.others.items())
    for start in (space.rates[0] / 4, space.rates[0] * 1.01, space.rates[-1] * 4):
        if count:
            rates = [start * (1 + number / 100) for number in range(count)]
            yield [SearchPoint(rate, space.targets[0], space.first_rank, others) for rate in rates]


def _most(
    space: SearchSpace, settings: SearchSettings, jobs: int, first: Sequence[SearchPoint]
) -> Mapping[Phase, int]:  # fmt: skip
    free = replace(settings, base_loss=BASE_LOSS, trials=None, seconds=None)
    searches = [_longest(space, free, jobs, first, level) for level in (None, *range(free.last_level))]
    most = {phase: max(counts[phase] for counts in searches) for phase in searches[0]}
    if settings.seconds is not None or settings.trials is not None:
        most["front"] *= jobs  # which is another one after each trial that ends late
    if settings.trials is None or settings.exploring_trials is None:
        return most
    begin = SearchPlan(space, settings, {}, {}, first).step()
    at_first = min(settings.exploring_trials, len(begin.trials) + begin.to_choose)
    exploring = settings.exploring_trials + jobs - 1
    return {
        "learning rate and layers": min(most["learning rate and layers"], exploring),
        "rank": min(most["rank"], exploring - at_first),
        "front": min(most["front"], settings.trials - at_first),
    }


def _longest(
    space: SearchSpace, settings: SearchSettings, jobs: int, first: Sequence[SearchPoint], failing: int | None
) -> dict[Phase, int]:
    """Trials of each phase. Of several at a time one is slow: what comes of it is known when all else is done.

    failing: the level at which what is first looked at is alone in the end, which leaves the more around it to look at.
    """
    results: dict[str, TrialOutcome] = {}
    tried: dict[str, TrialSpec] = {}
    counts: dict[Phase, int] = {"learning rate and layers": 0, "rank": 0, "front": 0}
    choices = list(dict.fromkeys((point.targets, point.others) for point in space.grid()))
    slow: list[TrialSpec] = []
    while True:
        step = (plan := SearchPlan(space, settings, results, tried, first)).step()
        new = [spec for spec in step.trials if spec.key not in tried]
        if not new and not slow:
            return counts
        if new:
            counts[step.phase] += len(new)
        tried |= {spec.key: spec for spec in new}
        running, slow = [*slow, *new], (slow or new[1:2]) if new and jobs > 1 else []
        for spec in running:
            if spec not in slow:
                choice = choices.index((spec.point.targets, spec.point.others))
                results[spec.key] = _outcome(spec, plan, choice, fails=spec.level == failing)


def _outcome(spec: TrialSpec, plan: SearchPlan, choice: int, *, fails: bool) -> TrialOutcome:
    """Of the first choice of layers short trials like the smallest rate alone, so that all others are walked through,
    which are better. Each larger rank is a gain. What is better takes more memory, so that all is on the front.
    """
    away = math.log(spec.point.rate / plan.space.rates[0]) / 1000
    if fails and away and not choice:
        return TrialOutcome("failed")
    if spec.level not in (plan.settings.last_level, FULL):
        loss = (2.0 if choice else 3.0 if away else 1.0) + away + 1e-12 * choice
    else:
        loss = (1.0 if not choice else 2.0) - abs(away) - (0.1 if away > 0 else 0.0) + 1e-12 * choice
    loss *= ((1 - plan.settings.margin) / 2) ** plan.ladder.index(spec.point.rank)
    return TrialOutcome(losses=RowLoss((loss,) * FEWEST, (1,) * FEWEST), memory=int(1e18 / loss))
