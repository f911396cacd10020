"""Begins a sweep, goes on with one, or joins one: rows, base and storage, up to the first trial."""

from __future__ import annotations

from contextlib import ExitStack
from math import exp
from pathlib import Path

from lora2serve.api.train_run import fetch_base
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import Recipe, dump
from lora2serve.errors import Lora2ServeError, UsageError
from lora2serve.progress import Progress
from lora2serve.sweeping.data_likeness import MOST_ROWS, DataFigures, data_figures
from lora2serve.sweeping.earlier_runs import EarlierRun, earlier_runs, first_points
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_loop import SweepLoop
from lora2serve.sweeping.sweep_preparation import PreparedSweep, place_of, prepare, refuse_unknown_database
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.sweeping.sweep_suite import PARTS, suite_order
from lora2serve.sweeping.trial_files import ROOT, TrialFiles
from lora2serve.sweeping.trial_ledger import TrialLedger, create_ledger, open_ledger, spec_to_json
from lora2serve.sweeping.trial_plans import TrialPlanner, trial_planner
from lora2serve.sweeping.trial_process import TrialPlace
from lora2serve.sweeping.trial_record import RowLoss, TrialSpec
from lora2serve.system import file_lock, scratch
from lora2serve.system.http import without_credentials
from lora2serve.weights.checkpoint import identity

MOST_SHOWN = 5  # earlier runs
FEW_ROWS = 20  # held out for the search, below which an interval says little


def started(request: SweepRequest, progress: Progress) -> SweepLoop:
    """The sweep of that name, begun or gone on with; UsageError where it asks something else."""
    prepared = prepare(request, progress)
    folder = prepared.files.folder
    base = fetch_base(prepared.recipe.model, progress)
    with scratch.filled(ROOT), ExitStack() as stack:
        keep = None if folder.exists() else stack.enter_context(scratch.claimed(folder))
        folder.mkdir(exist_ok=True)
        stack.enter_context(file_lock.locked(folder / ".starting", wait=True))
        ledger = _continued(prepared, progress) or _created(prepared, base, progress)
        if keep:
            keep()
    return _loop(ledger, prepared.files, prepared.planner, prepared.place, base, prepared.jobs, progress)


def joined(location: str, name: str | None, jobs: int | None, on: str | None, progress: Progress) -> SweepLoop:
    """One more worker of a sweep that was begun elsewhere; its folder must be here, too."""
    if "://" in location:
        refuse_unknown_database(location, "--join")
    else:
        location = str(Path(location).absolute())
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


def _continued(prepared: PreparedSweep, progress: Progress) -> TrialLedger | None:
    """The sweep of that name in that storage; None where there is none."""
    ledger = prepared.begun()
    if ledger is None:
        return None
    again = ledger.retry_failed()
    view = ledger.read()
    retried = f", {again} that failed are tried again" if again else ""
    progress.note(f"the sweep {prepared.name} goes on: {len(view.results)} trials are done{retried}")
    return ledger


def _created(prepared: PreparedSweep, base: Path, progress: Progress) -> TrialLedger:
    """A new one: rows are written, and the base is measured on them."""
    request, recipe, files = prepared.request, prepared.recipe, prepared.files
    sums = files.write(recipe, prepared.sets, request.fraction)
    shown = without_credentials(prepared.location)
    progress.note(f"sweep {prepared.name}: measuring the base; others may work on it, too, by --join {shown}")
    quality = prepared.quality
    measured = _measured(prepared, base)
    search, final = measured[-2:]
    base_rows = measured[0] if len(measured) > 2 else RowLoss()
    if len(search.sums) < FEW_ROWS:
        what = quality.rows(len(search.sums)) if quality.of_suite else f"{len(search.sums)} held-out rows"
        progress.warn(f"{what} for the search: few intervals will be narrow enough to end it")
    settings = prepared.settings(search.mean)
    figures = data_figures(_looked_at(prepared), (base_rows if quality.of_suite else search).mean or None)
    earlier = _earlier(base, recipe, figures, progress)
    first = [TrialSpec(point, 0, settings.seed) for point in first_points(earlier, prepared.space)]
    facts = SweepFacts(
        name=prepared.name, folder=str(files.folder), recipe=dump(recipe), recipe_name=str(request.recipe_file),
        question=prepared.question, steps=prepared.steps, fraction=request.fraction, rows=prepared.rows,
        all_rows=len(prepared.sets.train.rows),
        search_rows=len(search.sums), final_rows=len(final.sums), rows_sha256=sums, space=prepared.space,
        settings=settings, base_search=search, base_final=final, gpu=request.gpu,
        near=tuple(run.words for run in earlier[:MOST_SHOWN]), figures=figures,
        first=tuple(spec_to_json(spec) for spec in first), quality=quality, base_rows=base_rows,
    )  # fmt: skip
    return create_ledger(prepared.location, facts)


def _measured(prepared: PreparedSweep, base: Path) -> list[RowLoss]:
    """The base by what trials are judged by: on the part for the search, and on the one for the end.

    Where a suite judges, its eval loss on the rows of the search stands before both, if any are held out.
    """
    files, quality, place = prepared.files, prepared.quality, prepared.place
    if not quality.of_suite:
        return place.measure(files.recipe, base, [files.search_rows, files.final_rows])
    orders = [suite_order(quality, files, part) for part in PARTS]
    rows = [files.search_rows] if prepared.sets.held_out else []
    return place.measure(files.recipe, base, rows, [order for order in orders if order])


def _looked_at(prepared: PreparedSweep) -> list[dict[str, object]]:
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


def _loop(
    ledger: TrialLedger, files: TrialFiles, planner: TrialPlanner, place: TrialPlace, base: Path, jobs: int,
    progress: Progress,
) -> SweepLoop:  # fmt: skip
    losses = ledger.facts.base_eval
    known = EvalLoss(losses.mean, exp(min(losses.mean, 700.0)), sum(losses.tokens)) if losses.sums else None
    return SweepLoop(ledger, files, planner, place, base, known, jobs, progress)
