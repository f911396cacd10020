"""``lora2serve.sweep``: which learning rate, which layers and which rank, by trainings on a part of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.api.export_request import several
from lora2serve.api.train_run import settings
from lora2serve.artifacts.run import Run
from lora2serve.config import recipe as recipes
from lora2serve.config.arguments import checked
from lora2serve.config.model_name import refuse_run_name
from lora2serve.console import default_progress
from lora2serve.errors import SweepError, UsageError
from lora2serve.evaluation.harness_options import HarnessOptions, harness_options
from lora2serve.progress import Progress
from lora2serve.sweeping.constraint_choice import Constraint
from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_settings import MARGIN, read_budget
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_report import SweepReport, report
from lora2serve.sweeping.sweep_start import SweepRequest, joined, started
from lora2serve.sweeping.sweep_writers import write_result
from lora2serve.sweeping.trial_files import TrialFiles


@dataclass(frozen=True)
class SweepResult:
    """``best`` is the run of what is recommended, finished and exportable; ``recommended`` the recipe that gives it."""

    folder: Path
    report: SweepReport
    best: Run
    recommended: Path
    page: Path


@checked
def sweep(
    recipe: str | Path | None = None, *,
    space: str | Path | None = None, budget: str | int | None = None, fraction: float = 1.0, jobs: int | None = None,
    constraint: Constraint = "quality", margin: float = MARGIN, suite: str | Path | None = None,
    task: str | Sequence[str] = (), task_folder: str | Path | None = None, shots: int | None = None,
    chat: bool = False, limit: int | None = None, name: str | None = None, storage: str | None = None,
    join: str | None = None, gpu: str = "", on: str = "", overrides: Mapping[str, object] | Sequence[str] = (),
    progress: Progress | None = None,
) -> SweepResult:  # fmt: skip
    """Search the learning rate, the adapted layers and the rank of ``recipe``; the same call continues a sweep.

    recipe: a YAML file, a built-in name such as "demo", or nothing for ``lora2serve.yaml`` here. It must hold rows out.
    space: a YAML file of fields of the recipe with lists of values; by default six rates, all presets, ranks 8 to 64.
    budget: trials at most (``40``), or time (``"6h"``); by default as many as the search takes.
    fraction: of the training rows, for the first two phases.
    jobs: trials at a time; by default one for each GPU, or one.
    constraint: what is scarce: "quality", "memory" or "time".
    margin: a change that is none: of the eval loss as a share, of a suite's scores as such (0.01 is one point).
    name: of the folder under ``sweeps/``; the recipe's by default.
    storage: where trials are kept: a file of sqlite, a journal (``*.journal``), or ``postgresql://...``.
    join: the storage of a sweep that runs elsewhere, to work on it, too.
    gpu: a GPU's name or GiB: trials must fit into that, instead of what this machine has.
    suite: by whose scores trials are judged, instead of by the eval loss: a YAML file or a file of rows, as for
        ``evaluate``, or "held-out" for the answers to the held-out rows. Half of its items are for the end.
    task, task_folder, shots, chat, limit: tasks of lm-evaluation-harness instead of a suite, as for ``evaluate``.
    on: "ray" for tasks of a Ray cluster, instead of children of this process.
    overrides: fields of the recipe, as for ``train``.

    Raises UsageError and RecipeError for what cannot be searched, DataError, HubError, and SweepError where no trial
    gives a loss or the storage cannot be read. KeyboardInterrupt ends it; the same call goes on.
    """
    progress = progress or default_progress()
    _refuse(jobs, fraction, margin, name)
    harness = _harness(several(task), task_folder, shots, chat, limit, suite)
    if join is not None:
        _refuse_beside_join(recipe, overrides, space, storage, suite, harness)
        loop = joined(join, name, jobs, on, progress)
    else:
        trials, seconds = read_budget(None if budget is None else str(budget))
        loop = started(SweepRequest(
            recipe=recipes.find(str(recipe) if recipe else None), space=Path(space) if space else None, trials=trials,
            seconds=seconds, fraction=fraction, jobs=jobs, margin=margin, name=name, storage=storage, gpu=gpu, on=on,
            overrides=tuple(settings(overrides)), suite=None if suite is None else str(suite), harness=harness,
        ), progress)  # fmt: skip
    return _result(loop.run(), loop.files, loop.ledger.facts, constraint)


def _harness(
    tasks: tuple[str, ...], folder: str | Path | None, shots: int | None, chat: bool, limit: int | None,
    suite: str | Path | None,
) -> HarnessOptions | None:  # fmt: skip
    """The tasks to judge by; a suite is split whole."""
    harness = harness_options(tasks, folder, shots, chat, limit, suite)
    if limit is not None and not harness:
        raise UsageError(f"--limit {limit}: for --task")
    return harness


def _refuse_beside_join(*given: object) -> None:
    if any(given):
        raise UsageError(
            "--join takes recipe, space, rows, suite and tasks from the sweep that it joins", "leave the others out"
        )


def _refuse(jobs: int | None, fraction: float, margin: float, name: str | None) -> None:
    """UsageError for a value that cannot be."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: expected 1 at least")
    if not 0 < fraction <= 1:
        raise UsageError(f"--fraction {fraction:g}: expected more than 0 and at most 1")
    if not 0 < margin < 1:
        raise UsageError(f"--margin {margin:g}: expected more than 0 and less than 1")
    if name is not None:
        refuse_run_name(name, "--name")


def _result(plan: SearchPlan, files: TrialFiles, facts: SweepFacts, constraint: Constraint) -> SweepResult:
    if not plan.front:
        problems = [outcome.problem for outcome in plan.results.values() if not outcome.finished]
        raise SweepError(f"no trial gave a loss: {problems[-1] if problems else 'the budget ended before'}")
    result = report(plan, facts, constraint)
    write_result(result, facts, files)
    return SweepResult(files.folder, result, Run(Path(result.recommended.run)), files.recommended, files.page)
