"""One trial of a sweep: what is to be trained, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.sweeping.search_space import SearchPoint

Status = Literal["finished", "out of memory", "does not fit", "failed"]
FULL = -1  # the level of the last phase: all rows and all steps


@dataclass(frozen=True)
class TrialSpec:
    """One training. ``level`` is its place among the rungs of the search, which take more and more steps, or FULL."""

    point: SearchPoint
    level: int
    seed: int

    @property
    def key(self) -> str:
        """By which every worker knows it; the name of its run."""
        level = "full" if self.level == FULL else f"rung{self.level}"
        return f"{self.point.label}-{level}-seed{self.seed}"


@dataclass(frozen=True)
class RowLoss(JsonRecord):
    """Of held-out rows: the sum of the losses of each row's tokens, in nats, and how many they are.

    ``scored``: of a suite's items, what is missing of each one's score, counted as one token. Rows of one of the
    ``groups`` are no independent news; without groups each row stands for itself.
    """

    WHOLE: ClassVar[bool] = True

    sums: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    scored: bool = False
    groups: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether all are numbers: a training that diverged has none."""
        return all(map(math.isfinite, self.sums))

    @property
    def mean(self) -> float:
        """Over all tokens."""
        return sum(self.sums) / max(1, sum(self.tokens))

    @property
    def scores(self) -> list[float]:
        """One for each row, whose mean is the mean over all tokens."""
        scale = len(self.sums) / max(1, sum(self.tokens))
        return [total * scale for total in self.sums]


@dataclass(frozen=True)
class TrialOutcome(JsonRecord):
    """What a trial reached, and took. ``problem`` says why there is nothing of that, or why vLLM will not serve it."""

    status: Status = "finished"
    problem: str = ""
    losses: RowLoss = field(default_factory=RowLoss)
    seconds: float = 0.0  # of training, without loading
    wall: float = 0.0  # seconds of the whole trial
    memory: int = 0  # bytes of the GPU at the fullest moment, or what the plan says where there is none
    memory_measured: bool = False
    parameters: int = 0  # learned
    servable: bool = True  # by vLLM, beside other adapters
    run: str = ""  # directory
    host: str = ""
    curve: tuple[tuple[int, float], ...] = ()  # eval loss by step
    eval_loss: float | None = None  # where a suite judges and rows are held out, too: of two equal scores it decides

    @property
    def finished(self) -> bool:
        """Whether it has a loss."""
        return self.status == "finished"

    @property
    def objectives(self) -> Objectives:
        """What the sweep weighs of it."""
        return Objectives(self.losses.mean, self.memory, self.seconds, self.parameters, int(not self.servable))

    def infeasible(self, base_loss: float) -> Objectives:
        """The same of a trial without a loss, as a sampler is told of it: no better than the base, and not servable."""
        return Objectives(base_loss, self.memory, self.seconds, self.parameters, 1)


@dataclass(frozen=True)
class Objectives(JsonRecord):
    """What a sweep weighs, less of each being better; ``unservable`` is 1 where vLLM will not serve it with others."""

    WHOLE: ClassVar[bool] = True

    loss: float
    memory: int
    seconds: float
    parameters: int
    unservable: int

    @property
    def values(self) -> tuple[float, ...]:
        """In a fixed order."""
        return (self.loss, float(self.memory), self.seconds, float(self.parameters), float(self.unservable))
