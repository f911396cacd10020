"""``lora2serve.sweep``: which learning rate, which layers and which rank, by trainings on a part of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.api.export_request import several
from lora2serve.artifacts.run import Run
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import SweepError
from lora2serve.progress import Progress
from lora2serve.sweeping.constraint_choice import Constraint
from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_settings import MARGIN
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_report import SweepReport, report
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.sweeping.sweep_start import joined, started
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
    join: str | None = None, gpu: str = "", on: str | None = None, overrides: Mapping[str, object] | Sequence[str] = (),
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
    request = SweepRequest(
        recipe=recipe, space=space, budget=budget, fraction=fraction, jobs=jobs, constraint=constraint, margin=margin,
        suite=suite, task=several(task), task_folder=task_folder, shots=shots, chat=chat, limit=limit, name=name,
        storage=storage, join=join, gpu=gpu, on=on, overrides=overrides,
    )  # fmt: skip
    return run_sweep(request, progress)


@checked
def run_sweep(request: SweepRequest, progress: Progress | None = None) -> SweepResult:
    """``sweep``, with its arguments in one value."""
    progress = progress or default_progress()
    if request.join is not None:
        loop = joined(request.join, request.name, request.jobs, request.on, progress)
    else:
        loop = started(request, progress)
    return _result(loop.run(), loop.files, loop.ledger.facts, request.constraint)


def _result(plan: SearchPlan, files: TrialFiles, facts: SweepFacts, constraint: Constraint) -> SweepResult:
    if not plan.front:
        problems = [outcome.problem for outcome in plan.results.values() if not outcome.finished]
        raise SweepError(f"no trial gave a loss: {problems[-1] if problems else 'the budget ended before'}")
    result = report(plan, facts, constraint)
    write_result(result, facts, files)
    return SweepResult(files.folder, result, Run(Path(result.recommended.run)), files.recommended, files.page)
