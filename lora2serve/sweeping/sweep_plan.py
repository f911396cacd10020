"""``lora2serve.plan_sweep``: what a sweep would try, before hours of a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora2serve.api.train_run import fetch_base
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.progress import Progress
from lora2serve.sweeping.earlier_runs import MOST_POINTS, may_be_earlier
from lora2serve.sweeping.longest_search import most_trials
from lora2serve.sweeping.search_plan import MOST_WIDENED, Phase, SearchPlan
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.search_space import RANK, RATE, TARGETS, SearchSpace, Value
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_loop import plan_of
from lora2serve.sweeping.sweep_preparation import PreparedSweep, prepare
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.sweeping.trial_files import split_held_out, trial_overrides
from lora2serve.sweeping.trial_ledger import LedgerView, TrialLedger
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
    """What a sweep would try. Trials are counted at most: it ends where nothing more is to be found.

    done: trials of the sweep that is there already, 0 of one that was only begun; None where there is none.
    failed: trials of it that would be tried again.
    finished: whether nothing of it is left to be tried: ``sweep`` would train nothing, and give its result again.
    space: fields of the recipe, and the values of each; ``notes`` say what else may be tried.
    points: combinations of all these values; ``fitting`` of them fit into ``gpu_memory`` bytes by the plan of their
        memory, ``does_not_fit`` are the others; None where no such plan can be made.
    trials: of all ``phases``; also the budget, where it is one of trials.
    exploring_trials, seconds: a budget's: after so many trials the front begins; so long each of ``jobs`` works.
    steps: of a trial that the search trains to its end; ``rungs`` are the shares of them that are trained first, the
        last one all of them.
    rows, all_rows: that the search trains on, a ``fraction``; that the front is trained on.
    search_rows, final_rows: held out to judge the search, and the front.
    """

    name: str
    folder: Path
    storage: str
    done: int | None
    failed: int
    finished: bool
    space: Mapping[str, tuple[Value, ...]]
    points: int
    fitting: int | None
    gpu: str
    gpu_memory: int
    does_not_fit: tuple[PointsThatDoNotFit, ...]
    phases: tuple[PlannedPhase, ...]
    trials: int
    exploring_trials: int | None
    seconds: float | None
    jobs: int
    steps: int
    rungs: tuple[float, ...]
    fraction: float
    rows: int
    all_rows: int
    search_rows: int
    final_rows: int
    judged_by: str
    notes: tuple[str, ...]


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
    view = ledger.read() if ledger else None
    results = view.results.values() if view else ()
    failed = sum(outcome.status == "failed" for outcome in results)
    first = len(ledger.facts.first) if ledger else MOST_POINTS * may_be_earlier()
    phases = most_trials(space, settings, prepared.jobs, first)
    search, final = split_held_out(prepared.sets) if prepared.sets.held_out else ([], [])
    misfits = _misfits(prepared, settings)
    points = len(space.grid()) * len(space.ranks)
    known = prepared.planner.shape is not None
    return SweepPlan(
        name=prepared.name, folder=prepared.files.folder, storage=without_credentials(prepared.location),
        done=len(results) - failed if ledger else None, failed=failed,
        finished=bool(ledger and view and _is_finished(ledger.facts, view)),
        space={RATE: space.rates, TARGETS: space.targets, RANK: space.ranks, **space.others},
        points=points, fitting=points - sum(each.points for each in misfits) if known else None,
        gpu=prepared.planner.target.name, gpu_memory=prepared.planner.target.memory, does_not_fit=misfits,
        phases=tuple(PlannedPhase(*each) for each in phases.items()),
        trials=min(sum(phases.values()), settings.trials or sum(phases.values())),
        exploring_trials=settings.exploring_trials, seconds=prepared.request.seconds, jobs=prepared.jobs,
        steps=prepared.steps, rungs=settings.shares, fraction=prepared.request.fraction, rows=prepared.rows,
        all_rows=len(prepared.sets.train.rows), search_rows=len(search), final_rows=len(final),
        judged_by=prepared.quality.title, notes=tuple(_notes(space, settings, 0 if ledger else first)),
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
            plan = prepared.planner.plan(request.recipe_file, [*request.settings, *overrides])
            if plan.misfit:
                misfits.append(PointsThatDoNotFit(len(space.rates), point.words_of_any_rate, plan.misfit))
    return tuple(misfits)


def _is_finished(facts: SweepFacts, view: LedgerView) -> bool:
    """Whether nothing is left to be tried; what failed is tried again."""
    results = {key: outcome for key, outcome in view.results.items() if outcome.status != "failed"}
    tried = {key: spec for key, spec in view.tried.items() if key in results}
    return plan_of(facts, replace(view, results=results, tried=tried)).step().phase == "done"


def _notes(space: SearchSpace, settings: SearchSettings, earlier: int) -> Iterator[str]:
    """What is tried beside the space, and counted with it."""
    end = "where the best learning rate is an end of the range"
    yield f"{end}, rates beyond it are tried, too, {MOST_WIDENED} steps at most"
    larger = SearchPlan(space, settings, {}, {}).ladder[len(space.ranks) :]
    if larger:
        yield f"where the largest rank is still better, {' and '.join(map(str, larger))} may be tried, too"
    if earlier:
        yield (
            f"runs and sweeps here that are of this base and like data have points tried first, {earlier} at most, "
            "which are counted: the base's loss on the rows decides"
        )
