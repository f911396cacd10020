"""``lora2serve.train_many``: several fine-tunes, a GPU each; one that fails leaves the others."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora2serve.api.locate import locate
from lora2serve.api.train_run import fetch_base, settings
from lora2serve.config import recipe as recipes
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.config.recipe import Recipe
from lora2serve.console import default_progress
from lora2serve.data import data_sets
from lora2serve.errors import Lora2ServeError, RecipeError, UsageError
from lora2serve.hub import pin_data
from lora2serve.progress import Progress, Silent
from lora2serve.sweeping.leased_workers import LeasedWorkers, shares

WORKER = "lora2serve.sweeping.run_worker:RunWorker"


@dataclass(frozen=True)
class RunOutcome:
    """One of several fine-tunes: its run, or why there is none."""

    recipe: str
    state: Literal["finished", "failed"]
    run: str | None = None
    eval_loss: float | None = None  # None where no rows are held out
    seconds: float = 0.0
    problem: str = ""
    hint: str = ""


def train_many(
    recipe_files: Sequence[str | Path], *,
    jobs: int | None = None, overrides: Mapping[str, object] | Sequence[str] = (), gpu: str | None = None,
    progress: Progress | None = None, finished: Callable[[RunOutcome], object] = lambda _: None,
) -> list[RunOutcome]:  # fmt: skip
    """Fine-tune as each recipe says, ``jobs`` of them at a time, each in a process and on a GPU of its own.

    recipe_files: as ``train`` takes one. What a recipe has wrong is refused before the first begins, of all of them.
    jobs: by default one for each GPU, or one.
    overrides, gpu: of each, as in ``train``.
    finished: called with each outcome as it comes.

    Returns the outcomes in the order of the recipes. KeyboardInterrupt once all have ended, each with a checkpoint.
    """
    progress = progress or default_progress()
    words = settings(overrides)
    loaded = _loaded([str(file) for file in recipe_files], words)
    gpus, threads, count = shares(jobs)
    batch = _Batch(LeasedWorkers(WORKER, gpus, threads), words, gpu, progress)
    progress.note(f"{len(loaded)} trainings, {min(count, len(loaded))} at a time")
    outcomes: dict[int, RunOutcome] = {}

    def keep(number: int, outcome: RunOutcome) -> None:
        outcomes[number] = outcome
        finished(outcome)

    ready = []
    for number, (name, path, recipe) in enumerate(loaded):
        failed = batch.fetch(name, recipe)
        if failed:
            keep(number, failed)
        else:
            ready.append((number, name, path))
    with ThreadPoolExecutor(count) as pool, batch.ended_by_ctrl_c():
        futures = {pool.submit(batch.train, name, path): number for number, name, path in ready}
        for future in as_completed(futures):
            keep(futures[future], future.result())
    return [outcomes[number] for number in range(len(loaded))]


def _loaded(names: Sequence[str], overrides: Sequence[str]) -> list[tuple[str, Path, Recipe]]:
    """Each by its name; RecipeError with what is wrong with any of them."""
    loaded, problems = [], []
    for name in names:
        try:
            path = recipes.find(name)
            loaded.append((name, path.absolute(), recipes.load(path, overrides)))
        except UsageError as error:
            problems += [line if name in line else f"{name}: {line}" for line in error.message.splitlines()]
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)), "mend them; nothing was begun")
    return loaded


@dataclass
class _Batch:
    """What the trainings have in common."""

    workers: LeasedWorkers
    overrides: Sequence[str]
    gpu: str | None
    progress: Progress

    def fetch(self, name: str, recipe: Recipe) -> RunOutcome | None:
        """What it needs of the Hub into the cache, as workers are offline; the outcome where that cannot be had."""
        own = NamedProgress(self.progress, name)
        try:
            if _is_remote(recipe.data):
                data_sets.load(recipe.data, pin_data, recipe.train.objective)
            if recipe.train.from_adapter:
                locate(recipe.train.from_adapter, own)
            fetch_base(recipe.model, own)
        except Lora2ServeError as error:
            return self._failed(name, error, 0.0)
        return None

    def train(self, name: str, path: Path) -> RunOutcome:
        """One of them; whatever happens to it is its outcome."""
        begin, own = time.monotonic(), NamedProgress(self.progress, name)
        try:
            with self.workers.lent() as process:
                own.note("begins")
                result = process.call(
                    "train", answer=own.show, recipe=str(path), overrides=list(self.overrides), gpu=self.gpu,
                    folder=str(Path.cwd()),
                )  # fmt: skip
            return RunOutcome(name, "finished", result["run"], result["eval_loss"], result["seconds"])
        except Lora2ServeError as error:
            return self._failed(name, error, time.monotonic() - begin)

    def _failed(self, name: str, error: Lora2ServeError, seconds: float) -> RunOutcome:
        if not self.workers.stopped:
            self.progress.warn(f"{name}: failed: {error.message}")
        return RunOutcome(name, "failed", seconds=seconds, problem=error.message, hint=error.hint)

    @contextmanager
    def ended_by_ctrl_c(self) -> Iterator[None]:
        """The first lets each finish its step and save; a second ends them at once. No process is left in any case."""
        try:
            yield
        except KeyboardInterrupt:
            self.progress.note("each training finishes its step and saves; Ctrl-C again ends them at once")
            self.workers.stop(signal.SIGTERM)
            try:
                self.workers.wait()
            except KeyboardInterrupt:
                self.workers.stop()
            raise
        except BaseException:
            self.workers.stop()
            raise
        finally:
            self.workers.close()


class NamedProgress(Silent):
    """Words of one of several trainings, with its name before them; no bars."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def note(self, text: str) -> None:
        """One line of information."""
        self._progress.note(f"{self._name}: {text}")

    def warn(self, text: str) -> None:
        """One line that the user should act on."""
        self._progress.warn(f"{self._name}: {text}")

    def show(self, words: Mapping[str, str]) -> None:
        """What a worker asks to be shown."""
        if "warning" in words:
            self.warn(words["warning"])
        else:
            self.note(words["note"])


def _is_remote(data: DataRecipe) -> bool:
    return any(not Path(source.path).exists() for kind in ("train", "eval") for source in data.sources(kind))
