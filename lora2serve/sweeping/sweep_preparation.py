"""What a sweep knows before it writes anything, with all that can be refused by then."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import Recipe, dump
from lora2serve.data import data_sets
from lora2serve.data.data_sets import DataSets
from lora2serve.errors import UsageError, did_you_mean
from lora2serve.hub import pin_data
from lora2serve.progress import Progress
from lora2serve.registry.location import MOUNTS, SHARED, file_system
from lora2serve.sweeping.leased_workers import shares
from lora2serve.sweeping.ray_trials import ray_trials
from lora2serve.sweeping.search_settings import SearchSettings, rungs
from lora2serve.sweeping.search_space import SearchSpace, read_space
from lora2serve.sweeping.sweep_quality import EVAL_LOSS, Quality
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.sweeping.sweep_suite import suite_quality
from lora2serve.sweeping.trial_files import ROOT, TrialFiles, split_held_out
from lora2serve.sweeping.trial_ledger import TrialLedger, has_sweep, open_ledger
from lora2serve.sweeping.trial_plans import TrialPlanner, trial_planner, usable_targets
from lora2serve.sweeping.trial_process import ChildTrials, TrialPlace
from lora2serve.system.http import without_credentials

DATABASES = ("postgresql", "postgres", "sqlite")  # schemes of URLs; SQLAlchemy knows more


@dataclass(frozen=True)
class PreparedSweep:
    """What is known before anything is written."""

    request: SweepRequest
    recipe: Recipe
    sets: DataSets
    space: SearchSpace
    planner: TrialPlanner
    place: TrialPlace
    jobs: int
    files: TrialFiles
    location: str
    quality: Quality

    @property
    def name(self) -> str:
        return self.files.folder.name

    @property
    def question(self) -> str:
        """By which the same sweep is known again."""
        request, held_out = self.request, self.sets.held_out
        parts = [
            dump(self.recipe), self.space.to_json(), request.fraction, request.margin, request.trials, request.seconds,
            request.gpu, self.sets.train.sha256, held_out.sha256 if held_out else "",
        ]  # fmt: skip
        parts += [self.quality.to_json()] if self.quality.of_suite else []
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    @property
    def rows(self) -> int:
        """That the search trains on."""
        return max(1, round(len(self.sets.train.rows) * self.request.fraction))

    @property
    def steps(self) -> int:
        """Of a trial that the search trains to its end."""
        from lora2serve.training.schedule import total_steps

        steps = self.recipe.train.steps
        if steps is not None:
            return max(1, round(steps * self.request.fraction))
        return total_steps(self.recipe, self.rows)

    def settings(self, base_loss: float) -> SearchSettings:
        """How it searches, once the base's loss is known."""
        request, train = self.request, self.recipe.train
        return SearchSettings(
            base_loss=base_loss, shares=rungs(self.steps), seed=train.seed,
            alpha_per_rank=train.lora.alpha / train.lora.rank, margin=request.margin, trials=request.trials,
            seconds=request.seconds * self.jobs if request.seconds else None,
        )  # fmt: skip

    def begun(self) -> TrialLedger | None:
        """The sweep of that name in that storage; None where there is none, UsageError where it asks something else."""
        if not has_sweep(self.location, self.name):
            return None
        ledger = open_ledger(self.location, self.name)
        if ledger.facts.question != self.question:
            raise UsageError(
                f"{self.files.folder}: a sweep of another recipe, space, rows or budget",
                "--name gives this one a folder of its own; or remove that one",
            )
        return ledger


def prepare(request: SweepRequest, progress: Progress) -> PreparedSweep:
    """Everything up to the weights of the base; what is wrong with any of it is raised."""
    from lora2serve.training.requirements import check_libraries

    file = request.recipe_file
    recipe = recipes.load(file, request.settings)
    _refuse_other_trainings(recipe)
    space = read_space(Path(request.space) if request.space else None, file, request.settings)
    check_libraries(recipe.train.quantize)
    sets = data_sets.load(recipe.data, pin_data)
    quality = _quality(request, sets, progress)
    if sets.held_out or not quality.of_suite:
        split_held_out(sets)  # refused before anything is fetched
    place, jobs = place_of(request.on, request.jobs)
    planner = trial_planner(recipe, request.gpu, jobs, progress)
    space = replace(space, targets=usable_targets(space, planner.shape, progress))
    files = TrialFiles((ROOT / (request.name or recipe.name)).absolute())
    _refuse_unwritable(files.folder)
    location = _writable(request.storage, files.folder) if request.storage else str(_own_storage(files.folder))
    return PreparedSweep(request, recipe, sets, space, planner, place, jobs, files, location, quality)


def _refuse_other_trainings(recipe: Recipe) -> None:
    """UsageError for what has no rank and layers to be searched, or no eval loss to compare by."""
    train = recipe.train
    if train.method != "lora":
        raise UsageError(f"train.method: {train.method}, and a sweep searches the rank and layers of a lora")
    if train.from_adapter:
        raise UsageError(
            f"train.from_adapter: {train.from_adapter}, whose rank and layers are as they are: a sweep searches those",
            "leave it out: `lora2serve train` goes on from it",
        )
    if train.objective != "sft":
        raise UsageError(
            f"train.objective: {train.objective}, and a sweep compares by the eval loss of sft",
            "train recipes of several values beside each other, and compare the runs with `lora2serve evaluate`",
        )


def _quality(request: SweepRequest, sets: DataSets, progress: Progress) -> Quality:
    """By what the sweep judges; what is wrong with a suite or a task is raised."""
    if request.harness:
        from lora2serve.sweeping.sweep_tasks import task_quality

        progress.note(f"{request.harness.name}: looking for its rows")
        return task_quality(request.harness, sets, progress)
    return EVAL_LOSS if request.suite is None else suite_quality(str(request.suite), sets, progress)


def place_of(on: str | None, jobs: int | None) -> tuple[TrialPlace, int]:
    """Where trials run, and how many at a time: by default one for each GPU, or one."""
    if on == "ray":
        return ray_trials(jobs)
    if on:
        raise UsageError(f"--on {on}: unknown{did_you_mean(on, ['ray'])}", "known: ray")
    gpus, threads, count = shares(jobs)
    return ChildTrials(gpus, threads), count


def _refuse_unwritable(folder: Path) -> None:
    """UsageError where the folder of the sweep cannot be made, or takes no files."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise UsageError(f"{there}: {error.strerror}", "a sweep writes there: begin it in another folder") from None


def _writable(storage: str, sweep: Path) -> str:
    """A database as it is, a file as an absolute path; UsageError where none can be written. ``sweep`` will be made."""
    if "://" in storage:
        refuse_unknown_database(storage, "--storage")
        return storage
    path = Path(storage).absolute()
    if path.parent == sweep:
        return str(path)
    if path.is_dir():
        raise UsageError(f"--storage {storage}: a directory, expected a file", f"such as {Path(storage) / 'sweep.db'}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return str(path)
    except OSError as error:
        raise UsageError(f"--storage {storage}: {error.strerror}", "a file in a folder that may be written") from None


def refuse_unknown_database(storage: str, option: str) -> None:
    """UsageError for a URL of a kind that SQLAlchemy does not know; ``option`` is where it was named."""
    import sqlalchemy

    scheme = storage.partition("://")[0]
    if scheme in DATABASES:
        return
    try:
        sqlalchemy.dialects.registry.load(scheme.replace("+", "."))
    except sqlalchemy.exc.NoSuchModuleError:
        near = did_you_mean(scheme, DATABASES)
        raise UsageError(
            f"{option} {without_credentials(storage)}: unknown kind of database{near}",
            "expected a file of sqlite, a journal (*.journal), or postgresql://HOST/DATABASE",
        ) from None


def _own_storage(folder: Path) -> Path:
    """A file of sqlite; a journal where the file system is one of several machines, whose locks sqlite cannot trust."""
    mounts = MOUNTS.read_text(encoding="utf-8", errors="replace") if MOUNTS.is_file() else ""
    return folder / ("sweep.journal" if file_system(folder, mounts) in SHARED else "sweep.db")
