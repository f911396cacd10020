"""``lora2serve.plan_sweep``: what a sweep would try, before hours of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora2serve.api.train_run import fetch_base
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.progress import Progress
from lora2serve.sweeping.earlier_runs import MOST_POINTS, may_be_earlier
from lora2serve.sweeping.longest_search import most_trials
from lora2serve.sweeping.search_plan import Phase
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.search_space import RANK, RATE, TARGETS, Value
from lora2serve.sweeping.sweep_preparation import PreparedSweep, prepare
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.sweeping.trial_files import split_held_out, trial_overrides
from lora2serve.sweeping.trial_ledger import TrialLedger, spec_from_json
from lora2serve.sweeping.trial_record import TrialSpec
from lora2serve.system.http import without_credentials


@dataclass(frozen=True)
class PointsThatDoNotFit:
    """Points of all rates that would never be started, and why."""

    points: int
    words: str  # such as "rank 64 on all-linear"
    reason: str


@dataclass(frozen=True)
class PlannedPhase:
    """How many trials it takes at most."""

    phase: Phase
    trials: int


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would try. Trials are counted at most: it ends where nothing more is to be found."""

    name: str
    folder: Path
    storage: str
    done: int | None  # trials of the sweep that is there already, and would go on; None where there is none
    failed: int  # trials of it that would be tried again
    space: Mapping[str, tuple[Value, ...]]  # fields of the recipe, and their values
    points: int  # of the space
    fitting: int | None  # of them, by the plan of their memory; None where none can be made
    gpu: str  # that they are to fit into
    gpu_memory: int  # bytes
    does_not_fit: tuple[PointsThatDoNotFit, ...]
    phases: tuple[PlannedPhase, ...]
    trials: int  # of all phases
    exploring_trials: int | None  # of the budget, before the front
    seconds: float | None  # of the budget, for each of ``jobs``
    jobs: int
    steps: int  # of a trial that the search trains to its end
    rungs: tuple[float, ...]  # shares of them that are trained first
    fraction: float
    rows: int  # that the search trains on
    all_rows: int  # that the front is trained on
    search_rows: int  # held out for the search
    final_rows: int  # held out for the front
    judged_by: str
    notes: tuple[str, ...]  # what could not be known


@checked
def plan_sweep(request: SweepRequest, progress: Progress | None = None) -> SweepPlan:
    """What ``sweep`` would do; raises every refusal, and trains nothing, fetches no weights and writes nothing.

    Raises what ``sweep`` raises, and UsageError for a sweep to ``join``, which was planned where it was begun.
    """
    progress = progress or default_progress()
    if request.join is not None:
        raise UsageError("--dry-run and --join: a sweep that was begun needs no plan", "leave one of them out")
    prepared = prepare(request, progress)
    fetch_base(prepared.recipe.model, progress, weights=False)
    return _planned(prepared, prepared.begun())


def _planned(prepared: PreparedSweep, ledger: TrialLedger | None) -> SweepPlan:
    space, settings = prepared.space, prepared.settings(0.0)
    results = ledger.read().results.values() if ledger else ()
    failed = sum(outcome.status == "failed" for outcome in results)
    first = [spec_from_json(text).point for text in ledger.facts.first] if ledger else []
    phases = most_trials(space, settings, prepared.jobs, first)
    search, final = split_held_out(prepared.sets) if prepared.sets.held_out else ([], [])
    misfits = _misfits(prepared, settings)
    points = len(space.grid()) * len(space.ranks)
    known = prepared.planner.shape is not None
    return SweepPlan(
        name=prepared.name, folder=prepared.files.folder, storage=without_credentials(prepared.location),
        done=len(results) - failed if ledger else None, failed=failed,
        space={RATE: space.rates, TARGETS: space.targets, RANK: space.ranks, **space.others},
        points=points, fitting=points - sum(each.points for each in misfits) if known else None,
        gpu=prepared.planner.target.name, gpu_memory=prepared.planner.target.memory, does_not_fit=misfits,
        phases=tuple(PlannedPhase(*each) for each in phases.items()),
        trials=min(sum(phases.values()), settings.trials or sum(phases.values())),
        exploring_trials=settings.exploring_trials, seconds=prepared.request.seconds, jobs=prepared.jobs,
        steps=prepared.steps, rungs=settings.shares, fraction=prepared.request.fraction, rows=prepared.rows,
        all_rows=len(prepared.sets.train.rows), search_rows=len(search), final_rows=len(final),
        judged_by=prepared.quality.title, notes=_notes(ledger),
    )  # fmt: skip


def _misfits(prepared: PreparedSweep, settings: SearchSettings) -> tuple[PointsThatDoNotFit, ...]:
    """By the plan that a trial is refused by; the rate takes no memory."""
    request, space = prepared.request, prepared.space
    misfits = []
    for choice in replace(space, rates=space.rates[:1]).grid():
        for rank in space.ranks:
            point = replace(choice, rank=rank)
            trial = TrialSpec(point, 0, settings.seed)
            overrides = trial_overrides(trial, prepared.recipe.train, settings, prepared.files, request.fraction)
            plan = prepared.planner.plan(request.recipe_file, [*request.overrides, *overrides])
            if plan.misfit:
                misfits.append(PointsThatDoNotFit(len(space.rates), point.words_of_any_rate, plan.misfit))
    return tuple(misfits)


def _notes(ledger: TrialLedger | None) -> tuple[str, ...]:
    if ledger or not may_be_earlier():
        return ()
    return (
        f"runs and sweeps here that are of this base and like data have points tried first, {MOST_POINTS} at most "
        "beside these: the base's loss on the rows decides",
    )
