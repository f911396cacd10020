"""Begins a sweep, goes on with one, or joins one: rows, base and storage, up to the first trial."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path

from lora2serve.api.train_run import fetch_base
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import Recipe, dump
from lora2serve.data import data_sets
from lora2serve.data.data_sets import DataSets
from lora2serve.errors import Lora2ServeError, UsageError, did_you_mean
from lora2serve.evaluation.harness_options import HarnessOptions
from lora2serve.hub import pin_data
from lora2serve.progress import Progress
from lora2serve.registry.location import MOUNTS, SHARED, file_system
from lora2serve.sweeping.data_likeness import MOST_ROWS, DataFigures, data_figures
from lora2serve.sweeping.earlier_runs import EarlierRun, earlier_runs, first_points
from lora2serve.sweeping.leased_workers import shares
from lora2serve.sweeping.ray_trials import ray_trials
from lora2serve.sweeping.search_settings import SearchSettings, rungs
from lora2serve.sweeping.search_space import SearchSpace, read_space
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_loop import SweepLoop
from lora2serve.sweeping.sweep_quality import EVAL_LOSS, Quality
from lora2serve.sweeping.sweep_suite import PARTS, of_written_rows, suite_order, suite_quality
from lora2serve.sweeping.trial_files import ROOT, TrialFiles, split_held_out
from lora2serve.sweeping.trial_ledger import TrialLedger, create_ledger, has_sweep, open_ledger, spec_to_json
from lora2serve.sweeping.trial_plans import TrialPlanner, trial_planner, usable_targets
from lora2serve.sweeping.trial_process import ChildTrials, TrialPlace
from lora2serve.sweeping.trial_record import RowLoss, TrialSpec
from lora2serve.system import file_lock, scratch
from lora2serve.system.http import without_credentials
from lora2serve.weights.checkpoint import identity

MOST_SHOWN = 5  # earlier runs
FEW_ROWS = 20  # held out for the search, below which an interval says little


@dataclass(frozen=True)
class SweepRequest:
    """The arguments of ``sweep``, checked one by one."""

    recipe: Path
    space: Path | None
    trials: int | None
    seconds: float | None
    fraction: float
    jobs: int | None
    margin: float
    name: str | None
    storage: str | None
    gpu: str
    on: str
    overrides: tuple[str, ...]
    suite: str | None = None
    harness: HarnessOptions | None = None


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is written."""

    request: SweepRequest
    recipe: Recipe
    sets: DataSets
    space: SearchSpace
    planner: TrialPlanner
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


def started(request: SweepRequest, progress: Progress) -> SweepLoop:
    """The sweep of that name, begun or gone on with; UsageError where it asks something else."""
    from lora2serve.training.requirements import check_libraries

    recipe = recipes.load(request.recipe, request.overrides)
    if recipe.train.method != "lora":
        raise UsageError(f"train.method: {recipe.train.method}, and a sweep searches the rank and layers of a lora")
    if recipe.train.from_adapter:
        raise UsageError(
            f"train.from_adapter: {recipe.train.from_adapter}, whose rank and layers are as they are: a sweep searches "
            "those", "leave it out: `lora2serve train` goes on from it",
        )  # fmt: skip
    if recipe.train.objective != "sft":
        raise UsageError(
            f"train.objective: {recipe.train.objective}, and a sweep compares by the eval loss of sft",
            "train recipes of several values beside each other, and compare the runs with `lora2serve evaluate`",
        )
    space = read_space(request.space, request.recipe, request.overrides)
    check_libraries(recipe.train.quantize)
    sets = data_sets.load(recipe.data, pin_data)
    quality = _quality(request, sets, progress)
    if sets.held_out or not quality.of_suite:
        split_held_out(sets)  # refused before anything is fetched
    place, jobs = place_of(request.on, request.jobs)
    planner = trial_planner(recipe, request.gpu, jobs, progress)
    space = replace(space, targets=usable_targets(space, planner.shape, progress))
    files = TrialFiles((ROOT / (request.name or recipe.name)).absolute())
    location = _writable(request.storage, files.folder) if request.storage else str(_own_storage(files.folder))
    prepared = _Prepared(request, recipe, sets, space, planner, jobs, files, location, quality)
    base = fetch_base(recipe.model, progress)
    with scratch.filled(ROOT), ExitStack() as stack:
        keep = None if files.folder.exists() else stack.enter_context(scratch.claimed(files.folder))
        files.folder.mkdir(exist_ok=True)
        stack.enter_context(file_lock.locked(files.folder / ".starting", wait=True))
        ledger = _continued(prepared, progress) or _created(prepared, place, base, progress)
        if keep:
            keep()
    return _loop(ledger, files, planner, place, base, jobs, progress)


def _quality(request: SweepRequest, sets: DataSets, progress: Progress) -> Quality:
    """By what the sweep judges; what is wrong with a suite or a task is raised."""
    if request.harness:
        from lora2serve.sweeping.sweep_tasks import task_quality

        progress.note(f"{request.harness.name}: looking for its rows")
        return task_quality(request.harness, sets, progress)
    return EVAL_LOSS if request.suite is None else suite_quality(request.suite, sets, progress)


def joined(location: str, name: str | None, jobs: int | None, on: str, progress: Progress) -> SweepLoop:
    """One more worker of a sweep that was begun elsewhere; its folder must be here, too."""
    location = location if "://" in location else str(Path(location).absolute())
    ledger = open_ledger(location, name)
    facts, files = ledger.facts, TrialFiles(Path(ledger.facts.folder))
    if not files.recipe.is_file():
        raise UsageError(
            f"{facts.folder}: not on this machine, and the sweep {facts.name} has its rows and runs there",
            "begin the sweep in a folder that all machines share",
        )
    for needed in facts.quality.places:
        if not Path(needed).exists():
            raise UsageError(f"{needed}: not on this machine, and the sweep {facts.name} judges by it", "")
    recipe = recipes.load(files.recipe)
    place, count = place_of(on, jobs)
    planner = trial_planner(recipe, facts.gpu, count, progress)
    base = fetch_base(recipe.model, progress)
    progress.note(f"joined the sweep {facts.name} in {without_credentials(location)}")
    return _loop(ledger, files, planner, place, base, count, progress)


def place_of(on: str, jobs: int | None) -> tuple[TrialPlace, int]:
    """Where trials run, and how many at a time: by default one for each GPU, or one."""
    if on == "ray":
        return ray_trials(jobs)
    if on:
        raise UsageError(f"--on {on}: unknown{did_you_mean(on, ['ray'])}", "known: ray")
    gpus, threads, count = shares(jobs)
    return ChildTrials(gpus, threads), count


def _writable(storage: str, sweep: Path) -> str:
    """A database as it is, a file as an absolute path; UsageError where none can be written. ``sweep`` will be made."""
    if "://" in storage:
        return storage
    path = Path(storage).absolute()
    if path.parent == sweep:
        return str(path)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return str(path)
    except OSError as error:
        raise UsageError(f"--storage {storage}: {error.strerror}", "a file in a folder that may be written") from None


def _own_storage(folder: Path) -> Path:
    """A file of sqlite; a journal where the file system is one of several machines, whose locks sqlite cannot trust."""
    mounts = MOUNTS.read_text(encoding="utf-8", errors="replace") if MOUNTS.is_file() else ""
    return folder / ("sweep.journal" if file_system(folder, mounts) in SHARED else "sweep.db")


def _continued(prepared: _Prepared, progress: Progress) -> TrialLedger | None:
    """The sweep of that name in that storage; None where there is none."""
    if not has_sweep(prepared.location, prepared.name):
        return None
    ledger = open_ledger(prepared.location, prepared.name)
    if ledger.facts.question != prepared.question:
        raise UsageError(
            f"{prepared.files.folder}: a sweep of another recipe, space, rows or budget",
            "--name gives this one a folder of its own; or remove that one",
        )
    again = ledger.retry_failed()
    view = ledger.read()
    retried = f", {again} that failed are tried again" if again else ""
    progress.note(f"the sweep {prepared.name} goes on: {len(view.results)} trials are done{retried}")
    return ledger


def _created(prepared: _Prepared, place: TrialPlace, base: Path, progress: Progress) -> TrialLedger:
    """A new one: rows are written, and the base is measured on them."""
    request, recipe, files = prepared.request, prepared.recipe, prepared.files
    sums = files.write(recipe, prepared.sets, request.fraction)
    shown = without_credentials(prepared.location)
    progress.note(f"sweep {prepared.name}: measuring the base; others may work on it, too, by --join {shown}")
    quality = prepared.quality
    if quality.of_suite and not (quality.path or quality.harness):
        quality = of_written_rows(files, progress)
    measured = _measured(prepared, quality, place, base)
    search, final = measured[-2:]
    base_rows = measured[0] if len(measured) > 2 else RowLoss()
    if len(search.sums) < FEW_ROWS:
        what = quality.rows(len(search.sums)) if quality.of_suite else f"{len(search.sums)} held-out rows"
        progress.warn(f"{what} for the search: few intervals will be narrow enough to end it")
    rows = len(prepared.sets.train.rows)
    part = max(1, round(rows * request.fraction))
    steps = _steps(recipe, part, request.fraction)
    settings = SearchSettings(
        base_loss=search.mean, shares=rungs(steps), seed=recipe.train.seed,
        alpha_per_rank=recipe.train.lora.alpha / recipe.train.lora.rank, margin=request.margin, trials=request.trials,
        seconds=request.seconds * prepared.jobs if request.seconds else None,
    )  # fmt: skip
    figures = data_figures(_looked_at(prepared), (base_rows if quality.of_suite else search).mean or None)
    earlier = _earlier(base, recipe, figures, progress)
    first = [TrialSpec(point, 0, settings.seed) for point in first_points(earlier, prepared.space)]
    facts = SweepFacts(
        name=prepared.name, folder=str(files.folder), recipe=dump(recipe), recipe_name=str(request.recipe),
        question=prepared.question, steps=steps, fraction=request.fraction, rows=part, all_rows=rows,
        search_rows=len(search.sums), final_rows=len(final.sums), rows_sha256=sums, space=prepared.space,
        settings=settings, base_search=search, base_final=final, gpu=request.gpu,
        near=tuple(run.words for run in earlier[:MOST_SHOWN]), figures=figures,
        first=tuple(spec_to_json(spec) for spec in first), quality=quality, base_rows=base_rows,
    )  # fmt: skip
    return create_ledger(prepared.location, facts)


def _measured(prepared: _Prepared, quality: Quality, place: TrialPlace, base: Path) -> list[RowLoss]:
    """The base by what trials are judged by: on the part for the search, and on the one for the end.

    Where a suite judges, its eval loss on the rows of the search stands before both, if any are held out.
    """
    files = prepared.files
    if not quality.of_suite:
        return place.measure(files.recipe, base, [files.search_rows, files.final_rows])
    orders = [suite_order(quality, files, part) for part in PARTS]
    rows = [files.search_rows] if prepared.sets.held_out else []
    return place.measure(files.recipe, base, rows, [order for order in orders if order])


def _looked_at(prepared: _Prepared) -> list[dict[str, object]]:
    """The rows by which these data are told from others."""
    return [row.json() for row in (prepared.sets.held_out or prepared.sets.train).rows[:MOST_ROWS]]


def _earlier(base: Path, recipe: Recipe, figures: DataFigures, progress: Progress) -> list[EarlierRun]:
    """What was good on other data, the nearest first; nothing, after a note, where that cannot be read."""
    record = BaseRecord.from_json(identity(base, recipe.model.path, recipe.model.revision), "base")
    try:
        earlier = earlier_runs(record, figures)
    except Lora2ServeError as error:
        progress.note(f"earlier runs are not looked at: {error.message}")
        return []
    if earlier:
        near = [run for run in earlier if run.near]
        told = "; ".join(run.words for run in near[:MOST_SHOWN])
        progress.note(
            f"tried first, of data like these: {told}" if near else f"no earlier run is near: {earlier[0].words}"
        )
    return earlier


def _steps(recipe: Recipe, rows: int, fraction: float) -> int:
    from lora2serve.training.schedule import total_steps

    steps = recipe.train.steps
    return max(1, round(steps * fraction)) if steps is not None else total_steps(recipe, rows)


def _loop(
    ledger: TrialLedger, files: TrialFiles, planner: TrialPlanner, place: TrialPlace, base: Path, jobs: int,
    progress: Progress,
) -> SweepLoop:  # fmt: skip
    losses = ledger.facts.base_eval
    known = EvalLoss(losses.mean, exp(min(losses.mean, 700.0)), sum(losses.tokens)) if losses.sums else None
    return SweepLoop(ledger, files, planner, place, base, known, jobs, progress)
