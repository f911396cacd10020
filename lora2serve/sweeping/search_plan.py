"""What a sweep trains next, given what it has trained: a pure function of both, so that every worker finds the same.

1. Each learning rate with each choice of layers, at one rank, for a few steps; the best third for more; and so on. Then
   the best one's neighbors, until a smaller and a larger rate are both worse: an edge widens the range.
2. At what is best, ranks from the smallest on, until the next larger one brings nothing.
3. The front again, with all rows and steps, by several seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from lora2serve.sweeping.pareto import front
from lora2serve.sweeping.rank_steps import RankStep, rank_step
from lora2serve.sweeping.search_settings import SEEDS, SearchSettings
from lora2serve.sweeping.search_space import LARGEST_RANK, LARGEST_RATE, LEAST_RATE, SearchPoint, SearchSpace, show_rate
from lora2serve.sweeping.spread_points import spread
from lora2serve.sweeping.trial_record import FULL, Objectives, TrialOutcome, TrialSpec

Phase = Literal["learning rate and layers", "rank", "front", "done"]
Results = Mapping[str, TrialOutcome]  # by key, in the order of the trials
KEPT_SHARE, KEPT = 1 / 3, 2  # of a rung's points; at least so many
KEPT_GAIN = 0.9  # of the best one's gain over the base: below that no constraint makes up for it
MOST_WIDENED = 4  # steps beyond each end of the range
MOST_LARGER = 2  # doublings beyond the largest rank
MOST_GROUPS = 2  # choices of layers whose ranks are searched
MOST_FINALISTS = 4


@dataclass(frozen=True)
class Step:
    """What may run now. ``to_choose``: so many points of the first rung more, of a grid that is too large for all."""

    phase: Phase
    trials: tuple[TrialSpec, ...] = ()
    to_choose: int = 0


@dataclass(frozen=True)
class SearchPlan:
    """One look at a search. ``first`` are points to begin with, ``tried`` all that were begun, by key."""

    space: SearchSpace
    settings: SearchSettings
    results: Results
    tried: Mapping[str, TrialSpec]
    first: Sequence[SearchPoint] = field(default=())

    def step(self) -> Step:
        """The next trials, those that run already among them; none where all is done."""
        if not self.exploring_ended:
            for phase, missing in self._phases():
                step = missing()
                if step.trials or step.to_choose:
                    return replace(step, phase=phase)
        return Step("front" if (left := self._missing_finals()) else "done", left)

    def _phases(self) -> Iterator[tuple[Phase, Callable[[], Step]]]:
        yield "learning rate and layers", self._missing_rungs
        yield "learning rate and layers", self._missing_neighbors
        yield "rank", self._missing_ranks

    # --- the budget ---

    @property
    def exploring_ended(self) -> bool:
        """Whether the budget of the first two phases is used up."""
        most, seconds = self.settings.exploring_trials, self.settings.exploring_seconds
        explored = [key for key in self.results if self.tried[key].level != FULL]
        used = sum(self.results[key].wall for key in explored)
        return (most is not None and len(explored) >= most) or (seconds is not None and used >= seconds)

    @property
    def over_budget(self) -> bool:
        """Whether no trial may begin any more."""
        most, seconds = self.settings.trials, self.settings.seconds
        used = sum(outcome.wall for outcome in self.results.values())
        return (most is not None and len(self.tried) >= most) or (seconds is not None and used >= seconds)

    # --- the first phase ---

    def _missing_rungs(self) -> Step:
        points, wanted = self._first_points()
        last = self.settings.last_level
        level = 0
        while True:
            missing = self._missing([self.spec(point, level) for point in points])
            if missing or wanted:
                return Step("rank", missing, wanted)
            if level == last:
                return Step("rank")
            ranked = self.ranked(level, points)
            points = ranked[: max(KEPT, round(KEPT_SHARE * len(ranked)))]
            level = last if len(points) <= KEPT else level + 1

    def _first_points(self) -> tuple[list[SearchPoint], int]:
        """Those of the first rung as far as they are chosen, and how many are to be chosen still."""
        grid = list(dict.fromkeys([*self.first, *self.space.grid()]))
        most = self.settings.first_points
        if most is None or len(grid) <= most:
            return grid, 0
        half = max(len(self.first), most // 2)
        known = [spec.point for spec in self.tried.values() if spec.level == 0]
        points = list(dict.fromkeys([*self.first, *spread(self.space, half - len(self.first), self.first), *known]))
        return points[:most], max(0, most - len(points))

    def _missing_neighbors(self) -> Step:
        """Rates beside the best one's, of the same layers; beyond an end of the range where it is there."""
        best = self.best
        if best is None:
            return Step("rank")
        rates = self._neighbors(best.rate)
        return Step("rank", self._missing([self.spec(replace(best, rate=rate), self.top_level) for rate in rates]))

    def _neighbors(self, rate: float) -> list[float]:
        below, above = self.space.neighbors(rate)
        low, high = self.space.neighbors(self.space.rates[0])[0], self.space.neighbors(self.space.rates[-1])[1]
        step_down, step_up = self.space.rates[0] / low, high / self.space.rates[-1]
        least = max(LEAST_RATE, self.space.rates[0] / step_down**MOST_WIDENED)
        most = min(LARGEST_RATE, self.space.rates[-1] * step_up**MOST_WIDENED)
        return [near for near in (below, above) if least * 0.99 <= near <= most * 1.01]

    @cached_property
    def widened(self) -> tuple[float, ...]:
        """Rates that were tried beyond the range; not those of earlier runs, which were no step of this search."""
        rates = {spec.point.rate for spec in self.tried.values() if spec.point not in self.first}
        low, high = self.space.rates[0], self.space.rates[-1]
        return tuple(sorted(rate for rate in rates if rate < low or rate > high))

    @property
    def at_edge(self) -> str:
        """What of the best point is the outermost value that was tried; empty where nothing is."""
        best = self.best
        if best is None:
            return "nothing was trained to its end"
        rates = [spec.point.rate for spec, _ in self.finished_at(self.top_level) if spec.point.targets == best.targets]
        if len(rates) > 1 and best.rate in (min(rates), max(rates)):
            end = "smallest" if best.rate == min(rates) else "largest"
            return f"the best learning rate, {show_rate(best.rate)}, is the {end} that was tried"
        last = next((step for step in reversed(self.rank_steps) if step.targets == best.targets), None)
        if last is not None and last.verdict == "gain":
            return f"the largest rank that was tried, {last.larger}, is still better than {last.rank}"
        return ""

    # --- the second phase ---

    def _missing_ranks(self) -> Step:
        missing: list[TrialSpec] = []
        for point in self.rank_groups:
            missing += self._missing_of_group(point)
        return Step("rank", tuple(missing))

    def _missing_of_group(self, point: SearchPoint) -> tuple[TrialSpec, ...]:
        """The next rank of one choice of layers."""
        ranks = self.ladder
        for number, rank in enumerate(ranks):
            if missing := self._missing([self.spec(replace(point, rank=rank), self.top_level)]):
                return missing
            if number and (step := self._rank_step(point, ranks[number - 1], rank)) and self._is_end(step, rank):
                break
        return ()

    def _is_end(self, step: RankStep, rank: int) -> bool:
        return step.ends or (rank >= self.space.ranks[-1] and step.verdict != "gain")

    @property
    def ladder(self) -> list[int]:
        """Ranks from the smallest on, a few beyond the largest; one rank is not searched."""
        ranks = [*self.space.ranks]
        if len(ranks) > 1:
            ranks += [ranks[-1] * 2**n for n in range(1, MOST_LARGER + 1) if ranks[-1] * 2**n <= LARGEST_RANK]
        return ranks

    @cached_property
    def rank_groups(self) -> list[SearchPoint]:
        """The best point of the first phase for each choice of layers that keeps up with the best of all."""
        points = [point for point in self.ranked(self.top_level) if point.rank == self.space.first_rank]
        best: dict[object, SearchPoint] = {}
        for point in points:
            if self._gain_share(self._loss(point), self._loss(points[0])) >= KEPT_GAIN:
                best.setdefault((point.targets, point.others), point)
        return list(best.values())[:MOST_GROUPS]

    @cached_property
    def rank_steps(self) -> list[RankStep]:
        """What each larger rank brought."""
        steps: list[RankStep] = []
        for point in self.rank_groups:
            for rank, larger in zip(self.ladder, self.ladder[1:], strict=False):
                step = self._rank_step(point, rank, larger)
                if step is not None:
                    steps.append(step)
        return steps

    def _rank_step(self, point: SearchPoint, rank: int, larger: int) -> RankStep | None:
        old, new = (self.results.get(self.spec(replace(point, rank=r), self.top_level).key) for r in (rank, larger))
        if old is None or new is None or not (old.finished and new.finished):
            return None
        return rank_step(replace(point, rank=rank), old.losses, larger, new.losses, self.settings.margin)

    # --- the third phase ---

    @cached_property
    def front(self) -> list[SearchPoint]:
        """Of the points that were trained for all steps of the search, those that none dominates; the best first."""
        points = self.ranked(self.top_level)
        values = [self.objectives(point).values for point in points]
        return [points[number] for number in front(values)]

    @cached_property
    def finalists(self) -> list[SearchPoint]:
        """The part of the front that some constraint could recommend."""
        most = MOST_FINALISTS
        if self.settings.trials is not None:
            explored = sum(spec.level != FULL for spec in self.tried.values())
            most = min(most, max(1, (self.settings.trials - explored) // SEEDS))
        smallest = min((self._loss(point) for point in self.front), default=0.0)
        good = [point for point in self.front if self._gain_share(self._loss(point), smallest) >= KEPT_GAIN]
        return good[:most]

    def _missing_finals(self) -> tuple[TrialSpec, ...]:
        if self.over_budget:
            return ()
        return self._missing([TrialSpec(point, FULL, seed) for point in self.finalists for seed in self.settings.seeds])

    # --- what was reached ---

    @cached_property
    def top_level(self) -> int:
        """The rung that says most: the last one, or the largest one with a loss where the budget ended before."""
        if not self.exploring_ended:
            return self.settings.last_level
        return max((self.tried[key].level for key, outcome in self.results.items() if outcome.finished), default=0)

    @property
    def best(self) -> SearchPoint | None:
        """That with the smallest loss at the top level and the first phase's rank."""
        return next((point for point in self.ranked(self.top_level) if point.rank == self.space.first_rank), None)

    def ranked(self, level: int, among: Sequence[SearchPoint] | None = None) -> list[SearchPoint]:
        """Points with a loss at that level, the smallest first; of equal scores, that with the smaller eval loss."""
        losses = {spec.point: (o.losses.mean, o.eval_loss or 0.0) for spec, o in self.finished_at(level)}
        chosen = [point for point in (losses if among is None else among) if point in losses]
        return sorted(chosen, key=lambda point: (losses[point], point.label))

    def objectives(self, point: SearchPoint, level: int | None = None) -> Objectives:
        """Of a point with a loss. Its time is the least of all whose layers and rank are the same: the learning rate
        does not change it, and what else runs on the machine only adds to it.
        """
        level = self.top_level if level is None else level
        outcome = self.results[self.spec(point, level).key]
        alike = [
            other.seconds for spec, other in self.finished_at(level) if replace(spec.point, rate=point.rate) == point
        ]
        return replace(outcome.objectives, seconds=min(alike))

    def _gain_share(self, loss: float, smallest: float) -> float:
        """How much of the smallest loss's gain over the base a loss has; 1 where nothing gained anything."""
        whole = self.settings.base_loss - smallest
        return (self.settings.base_loss - loss) / whole if whole > 0 else 1.0

    def spec(self, point: SearchPoint, level: int) -> TrialSpec:
        """A trial of the search: all of them have one seed."""
        return TrialSpec(point, level, self.settings.seed)

    def _loss(self, point: SearchPoint) -> float:
        return self.results[self.spec(point, self.top_level).key].losses.mean

    def finished_at(self, level: int) -> list[tuple[TrialSpec, TrialOutcome]]:
        """Trials of that level with a loss, in their order."""
        pairs = [(self.tried[key], outcome) for key, outcome in self.results.items()]
        return [(spec, outcome) for spec, outcome in pairs if spec.level == level and outcome.finished]

    def _missing(self, specs: Sequence[TrialSpec]) -> tuple[TrialSpec, ...]:
        return tuple(spec for spec in specs if spec.key not in self.results)
