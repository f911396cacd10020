"""Whether a search has looked far enough, as figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.sweeping.pareto import hypervolume, normalized
from lora2serve.sweeping.search_plan import SearchPlan

ENOUGH = 0.01  # growth of the hypervolume over the last third
FEWEST = 3  # trials, of which there is a last third
REFERENCE = 1.1  # in each figure, where 1 is the worst


@dataclass(frozen=True)
class Explored(JsonRecord):
    """``growth``: how much of the front's hypervolume came in the last third of the search's trials of all steps.

    ``at_edge`` says what of the best point is the outermost value that was tried, or is empty.
    """

    WHOLE: ClassVar[bool] = True

    growth: float
    trials: int
    at_edge: str
    budget_ended: bool

    @property
    def enough(self) -> bool:
        """Whether it is."""
        return self.trials >= FEWEST and self.growth < ENOUGH and not self.at_edge and not self.budget_ended

    @property
    def words(self) -> str:
        """In a sentence or two."""
        last = f"the last third of {self.trials} trials brought {self.growth:.1%} of the front's volume"
        if self.trials < FEWEST:
            last = f"{self.trials} finished with all steps of the search, and fewer than {FEWEST} say nothing"
        why = [last] + [self.at_edge] * bool(self.at_edge) + ["the budget ended the search"] * self.budget_ended
        return f"Explored enough: {last}." if self.enough else f"Not explored enough: {'; '.join(why)}."


def explored(plan: SearchPlan) -> Explored:
    """Of a search as it is."""
    level = plan.top_level
    order = [plan.tried[key].point for key, o in plan.results.items() if plan.tried[key].level == level and o.finished]
    values = normalized([plan.objectives(point).values for point in order])
    growth = 0.0
    if values:
        reference = (REFERENCE,) * len(values[0])
        whole = hypervolume(values, reference)
        before = hypervolume(values[: len(values) - len(values) // 3], reference)
        growth = 1 - before / whole
    return Explored(growth, len(values), plan.at_edge, plan.exploring_ended)
