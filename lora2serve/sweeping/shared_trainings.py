"""``train_many(..., share_base=True)``: several adapters on one base, which is loaded once, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.memory_check import refuse_too_large_together
from lora2serve.api.train_run import train_here, with_adapter
from lora2serve.artifacts.run import Run
from lora2serve.config import lora_inits
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import Recipe
from lora2serve.config.train_methods import LORA
from lora2serve.errors import Lora2ServeError, RecipeError
from lora2serve.progress import Progress, Silent
from lora2serve.sweeping.run_outcome import NamedBars, RunOutcome, eval_loss
from lora2serve.training.requirements import check_libraries, translated

if TYPE_CHECKING:
    from lora2serve.training.shared_base import SharedBase
    from lora2serve.training.turns import Turn

OF_ONE_TRAINING = ("tensorboard", "none")  # trackers that tell several trainings of one process apart
WAY_OUT = "make them agree, or leave --share-base out"


@dataclass(frozen=True)
class SharedTrainings:
    """What the trainings have in common. ``resume``: they are runs, and go on."""

    overrides: Sequence[str]
    resume: bool
    gpu: str | None
    progress: Progress
    finished: Callable[[int, RunOutcome], object]

    def run(self, loaded: Sequence[tuple[str, Path, Recipe]]) -> None:
        """Train them, each by its name; KeyboardInterrupt once all have ended, each with a checkpoint."""
        refuse_differences([(name, recipe) for name, _, recipe in loaded])
        check_libraries(loaded[0][2].train.quantize)
        with translated():
            from lora2serve.training.shared_base import SharedBase
            from lora2serve.training.turns import Turns

            plannable = [
                recipe if self.resume else with_adapter(recipe, recipes.named_keys(path, self.overrides), Silent())
                for _, path, recipe in loaded
            ]
            refuse_too_large_together(plannable, self.gpu, self.progress)
        self.progress.note(f"{len(loaded)} trainings on one base, which take turns")
        base = SharedBase()
        jobs = [_SharedJob(self, base, number, name, path) for number, (name, path, _) in enumerate(loaded)]
        try:
            ends = Turns(self._say_stopping).run([job.run for job in jobs])
        except KeyboardInterrupt:
            self._say_how_to_go_on([job.folder for job in jobs if job.folder])
            raise
        for unexpected in filter(None, ends):
            raise unexpected

    def _say_stopping(self) -> None:
        self.progress.note("each training finishes its step and saves; Ctrl-C again ends them at once")

    def _say_how_to_go_on(self, folders: Sequence[Path]) -> None:
        names = [str(folder) for folder in folders if Run(folder).resumable]
        if names[1:]:
            self.progress.note(f"`lora2serve train --share-base --resume {' '.join(names)}` continues them together")


class _SharedJob:
    """One of them."""

    def __init__(self, together: SharedTrainings, base: SharedBase, number: int, name: str, path: Path) -> None:
        self._together, self._base, self._number, self._path = together, base, number, path
        self._progress = NamedBars(together.progress, name)
        self.folder: Path | None = None

    def run(self, turn: Turn) -> None:
        """Whatever happens to it is its outcome."""
        from lora2serve.training.shared_base import SharedTraining

        begin, together = time.monotonic(), self._together
        name = self._progress.name
        recipe = self._path.parent if together.resume else self._path
        shared = SharedTraining(self._base, turn, self._begin)
        try:
            run = train_here(
                recipe, together.overrides, None, together.resume, together.gpu, self._progress, shared=shared
            )
            outcome = RunOutcome(name, "finished", str(run.path), eval_loss(run), time.monotonic() - begin)
        except Lora2ServeError as error:
            together.progress.warn(f"{name}: failed: {error.message}")
            outcome = RunOutcome(
                name, "failed", seconds=time.monotonic() - begin, problem=error.message, hint=error.hint
            )
        together.finished(self._number, outcome)

    def _begin(self, folder: Path) -> None:
        self.folder = folder


def refuse_differences(trainings: Sequence[tuple[str, Recipe]]) -> None:
    """RecipeError with all that keeps these recipes, each with its name, from sharing a base."""
    problems = [
        f"{key}: {'; '.join(f'{value} in {_listed(names)}' for value, names in values.items())}"
        for key, values in _values(trainings).items()
        if len(values) > 1
    ]
    for name, recipe in trainings:
        train = recipe.train
        if train.method == LORA and lora_inits.changes_base(train.lora.init):
            problems.append(
                f"train.lora.init: {train.lora.init} in {name} takes a part of the base out, which is shared"
            )
        problems += [
            f"train.trackers: {tracker} in {name} has one training of a process at a time"
            for tracker in train.trackers
            if tracker not in OF_ONE_TRAINING
        ]
    if problems:
        raise RecipeError("\n".join(problems), WAY_OUT)


def _values(trainings: Sequence[tuple[str, Recipe]]) -> Mapping[str, Mapping[str, list[str]]]:
    """By what a base is loaded: key -> value -> names of the recipes."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, recipe in trainings:
        for key, value in _of_base(recipe):
            found.setdefault(key, {}).setdefault(value, []).append(name)
    return found


def _of_base(recipe: Recipe) -> Iterator[tuple[str, str]]:
    path = Path(recipe.model.path)
    yield "model.path", str(path.resolve()) if path.exists() else recipe.model.path
    yield "model.revision", recipe.model.revision or "none"
    yield "train.quantize", recipe.train.quantize
    if recipe.train.quantize != "none":
        yield "train.double_quant", str(recipe.train.double_quant).lower()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
