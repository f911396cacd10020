"""``lora2serve.train_many``: several fine-tunes, a GPU each; one that fails leaves the others."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora2serve.api.train_run import settings, unfinished
from lora2serve.config import recipe as recipes
from lora2serve.config.arguments import checked
from lora2serve.config.recipe import Recipe
from lora2serve.console import default_progress
from lora2serve.errors import Lora2ServeError, RecipeError, UsageError, did_you_mean
from lora2serve.progress import Progress
from lora2serve.sweeping.leased_workers import LeasedWorkers, shares
from lora2serve.sweeping.ray_trainings import RayTrainings, TrainingOrder, ray_trainings
from lora2serve.sweeping.remote_inputs import fetch_inputs
from lora2serve.sweeping.run_outcome import NamedProgress, RunOutcome

WORKER = "lora2serve.sweeping.run_worker:RunWorker"
LoadedRecipe = tuple[str, Path, Recipe]  # by the name that it was given


@checked
def train_many(
    recipe_files: Sequence[str | Path], *,
    jobs: int | None = None, share_base: bool = False, on: str | None = None, gpus: int | None = None,
    resume: bool = False,
    overrides: Mapping[str, object] | Sequence[str] = (), gpu: str | None = None,
    progress: Progress | None = None, finished: Callable[[RunOutcome], object] = lambda _: None,
) -> list[RunOutcome]:  # fmt: skip
    """Fine-tune as each recipe says, ``jobs`` of them at a time, each in a process and on a GPU of its own.

    recipe_files: as ``train`` takes one. What a recipe has wrong is refused before the first begins, of all of them.
    jobs: by default one for each GPU, or one.
    share_base: all at the same time in this process, on one base, which is loaded once; a step of each in turn.
        RecipeError where the recipes do not agree on it.
    on: "ray", or "ray://HOST:PORT": on a Ray cluster whose nodes all see this folder, as many at a time as have room.
    gpus: on Ray, how many train each recipe together; one by default.
    resume: with ``share_base`` or ``on``, ``recipe_files`` are runs that were interrupted, and go on.
    overrides, gpu: of each, as in ``train``.
    finished: called with each outcome as it comes.

    Returns the outcomes in the order of the recipes. KeyboardInterrupt once all have ended, each with a checkpoint.
    """
    progress = progress or default_progress()
    _refuse_mixtures(jobs, share_base, on, gpus, resume, bool(overrides))
    words = settings(overrides)
    loaded = load_all([str(file) for file in recipe_files], words, resume)
    outcomes: dict[int, RunOutcome] = {}

    def keep(number: int, outcome: RunOutcome) -> None:
        outcomes[number] = outcome
        finished(outcome)

    if share_base:
        from lora2serve.sweeping.shared_trainings import SharedTrainings

        SharedTrainings(words, resume, gpu, progress, keep).run(loaded)
    elif on:
        _train_on_ray(ray_trainings(on, gpus, progress), loaded, words, gpu, resume, keep)
    else:
        _train_apart(loaded, jobs, words, gpu, progress, keep)
    return [outcomes[number] for number in range(len(loaded))]


def _refuse_mixtures(
    jobs: int | None, share_base: bool, on: str | None, gpus: int | None, resume: bool, overridden: bool
) -> None:  # fmt: skip
    """UsageError with all arguments that do not go together."""
    problems = []
    if share_base and jobs:
        problems.append("share_base and jobs: trainings on one base are all in one process")
    if on and (share_base or jobs):
        problems.append("on, with jobs or share_base: Ray says what runs where")
    if gpus is not None and (gpus < 1 or not on):
        problems.append(f"gpus: {gpus}, expected at least 1, with on")
    if resume and not (share_base or on):
        problems.append("resume: of trainings on one base (share_base), or on Ray (on)")
    if resume and overridden:
        problems.append("resume keeps the recipes as they were: no overrides")
    hint = "leave one of them out" if problems else ""
    if on and on != "ray" and not on.startswith("ray://"):
        near = did_you_mean(on.partition("://")[0], ["ray"])
        problems.append(f"--on {on}: expected ray, or ray://HOST:PORT of a cluster's head{near}")
    if problems:
        raise UsageError("\n".join(problems), hint)


def _train_apart(
    loaded: Sequence[LoadedRecipe], jobs: int | None, overrides: Sequence[str], gpu: str | None, progress: Progress,
    keep: Callable[[int, RunOutcome], object],
) -> None:  # fmt: skip
    """Each in a process of its own."""
    gpus, threads, count = shares(jobs)
    batch = _Batch(LeasedWorkers(WORKER, gpus, threads), overrides, gpu, progress)
    progress.note(f"{len(loaded)} trainings, {min(count, len(loaded))} at a time")
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


def load_all(names: Sequence[str], overrides: Sequence[str], resume: bool = False) -> list[LoadedRecipe]:
    """Each by its name; RecipeError with what is wrong with any of them."""
    loaded, problems = [], []
    begun: set[Path] = set()
    for name in names:
        try:
            path = unfinished(name).recipe if resume else recipes.find(name)
            if resume and path.resolve() in begun:
                raise UsageError(f"--resume {name}: named twice, and one training writes into a run")
            begun.add(path.resolve())
            loaded.append((name, path if resume else path.absolute(), recipes.load(path, overrides)))
        except UsageError as error:
            problems += [line if name in line else f"{name}: {line}" for line in error.message.splitlines()]
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)), "mend them; nothing was begun")
    return loaded


def _train_on_ray(
    trainings: RayTrainings, loaded: Sequence[LoadedRecipe], overrides: Sequence[str], gpu: str | None, resume: bool,
    keep: Callable[[int, RunOutcome], object],
) -> None:  # fmt: skip
    """Each in a place that Ray finds for it."""
    orders: list[tuple[str, TrainingOrder]] = [
        (name, {
            "recipe": str(path.parent if resume else path), "overrides": list(overrides), "gpu": gpu,
            "folder": str(Path.cwd()), "resume": resume,
        })
        for name, path, _ in loaded
    ]  # fmt: skip
    trainings.run(orders, keep)


@dataclass
class _Batch:
    """What the trainings have in common."""

    workers: LeasedWorkers
    overrides: Sequence[str]
    gpu: str | None
    progress: Progress

    def fetch(self, name: str, recipe: Recipe) -> RunOutcome | None:
        """What it needs of the Hub into the cache, as workers are offline; the outcome where that cannot be had."""
        try:
            fetch_inputs(recipe, NamedProgress(self.progress, name))
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
