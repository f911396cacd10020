"""Everything that a sweep is asked for, in one typed value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.api.train_run import settings
from lora2serve.config import recipe as recipes
from lora2serve.config.arguments import take_fields
from lora2serve.config.model_name import refuse_run_name
from lora2serve.errors import UsageError
from lora2serve.evaluation.harness_options import HarnessOptions, harness_options
from lora2serve.sweeping.constraint_choice import Constraint
from lora2serve.sweeping.search_settings import MARGIN, read_budget


@dataclass(frozen=True)
class SweepRequest:
    """The arguments of ``lora2serve.sweep``, which has them explained."""

    recipe: str | Path | None = None
    space: str | Path | None = None
    budget: str | int | None = None
    fraction: float = 1.0
    jobs: int | None = None
    constraint: Constraint = "quality"
    margin: float = MARGIN
    suite: str | Path | None = None
    task: tuple[str, ...] = ()
    task_folder: str | Path | None = None
    shots: int | None = None
    chat: bool = False
    limit: int | None = None
    name: str | None = None
    storage: str | None = None
    join: str | None = None
    gpu: str = ""
    on: str | None = None
    overrides: Mapping[str, object] | Sequence[str] = ()

    def __post_init__(self) -> None:
        """UsageError for values that no type checker has seen, and for what cannot be or contradicts itself."""
        take_fields(self)
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs}: expected 1 at least")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"--fraction {self.fraction:g}: expected more than 0 and at most 1")
        if not 0 < self.margin < 1:
            raise UsageError(f"--margin {self.margin:g}: expected more than 0 and less than 1")
        if self.name is not None:
            refuse_run_name(self.name, "--name")
        if self.limit is not None and not self.harness:
            raise UsageError(f"--limit {self.limit}: for --task")
        of_the_joined = (self.recipe, self.overrides, self.space, self.storage, self.suite, self.harness)
        if self.join is not None and any(of_the_joined):
            raise UsageError(
                "--join takes recipe, space, rows, suite and tasks from the sweep that it joins", "leave the others out"
            )
        read_budget(self.budget)
        settings(self.overrides)

    @property
    def recipe_file(self) -> Path:
        """The YAML of ``recipe``."""
        return recipes.find(str(self.recipe) if self.recipe else None)

    @property
    def settings(self) -> Sequence[str]:
        """``overrides`` as ``KEY=VALUE``."""
        return settings(self.overrides)

    @property
    def trials(self) -> int | None:
        """The budget, if it is one of trials."""
        return read_budget(self.budget)[0]

    @property
    def seconds(self) -> float | None:
        """The budget, if it is one of time."""
        return read_budget(self.budget)[1]

    @property
    def harness(self) -> HarnessOptions | None:
        """The tasks to judge by; a suite is split whole."""
        return harness_options(self.task, self.task_folder, self.shots, self.chat, self.limit, self.suite)
