"""``lora2serve.evaluate``: what models score on a suite, in the engines that serve them, and whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.evaluated_model import EvaluatedModel, find_models, heldout_rows, planned, refuse_same
from lora2serve.api.evaluation_request import EvaluationRequest
from lora2serve.api.export_request import Named, several
from lora2serve.api.registered import record_scores
from lora2serve.artifacts import run as runs
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import InputError, UsageError
from lora2serve.evaluation.eval_report import EvalReport
from lora2serve.evaluation.evaluation_plan import EvaluationPlan, foreseen, of_suite, plan_of_suite, plan_of_tasks
from lora2serve.evaluation.harness_options import HarnessOptions, harness_options
from lora2serve.evaluation.score_gates import ScoreGate, parse_gate, refuse_unknown
from lora2serve.evaluation.suite import HELD_OUT, Suite, SuiteRecipe, of_rows, read_suite
from lora2serve.progress import Progress
from lora2serve.system import scratch
from lora2serve.system.small_files import plain_path

if TYPE_CHECKING:
    from lora2serve.evaluation.harness_tasks import TaskSubject
    from lora2serve.evaluation.suite_evaluation import Evaluated

REPORT = "report"  # the folder of the page, in that of the scores


@dataclass(frozen=True)
class EvaluationResult:
    """The report, and the page that shows it; report.json lies beside the page, ``records`` are the scores' files."""

    report: EvalReport
    page: Path
    records: tuple[Path, ...]

    @property
    def met(self) -> bool:
        """Whether every gate is met; a gate for which there are not enough items is not."""
        return self.report.met


@checked
def evaluate(
    model: Named | Sequence[Named] | None = None, *,
    against: Named | None = None, suite: Named | None = None, limit: int | None = None,
    gate: str | Sequence[str] = (), task: str | Sequence[str] = (), task_folder: Named | None = None,
    shots: int | None = None, chat: bool = False, engine: str = "", base: Named | None = None,
    url_model: str | None = None, allow_overlap: bool = False, out: Named | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:  # fmt: skip
    """Put a suite to models and score their answers; each is asked in the engine that serves it.

    model: a run, an export, an adapter, a version of a registry, a model's directory, a Hub id of one of these, or the
        address of a server that speaks OpenAI's API; or several of them. ``runs/latest`` by default.
    against: what they are compared with, item by item: "base" is the first without its adapter, whose answers are
        kept for the next time. Without it, several models are compared with the first.
    suite: a YAML file that names rows and a scorer, or a file of rows; by default the run's held-out rows.
    limit: only so many items, the first.
    gate: what must hold, such as ``"acc >= base - 0.01"`` or ``"answers.acc >= 0.9"``; see ``EvaluationResult.met``.
    task: tasks of lm-evaluation-harness instead of a suite, such as ``"arc_easy"``; needs the extra ``eval``, and the
        data sets of the tasks here or from the Hub.
    task_folder, shots, chat: a folder of more tasks; examples before each question (default: the task's); whether
        questions are written by the chat template, as served.
    engine: which engine answers for exports: peft, transformers, vllm-server or llama.cpp.
    base: for adapters, the base to load; the one trained on by default.
    url_model: the model's name at an address; the first that it lists by default.
    allow_overlap: evaluate on questions that were trained on, too.
    out: the folder of the scores; the run's ``evals/``, or ``evals/NAME``, by default.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises UsageError, RecipeError and DataError for what cannot be asked, InputError for a suite that was trained on,
    EngineError for an engine that is not installed or ends, HubError for what cannot be fetched.
    """
    request = EvaluationRequest(
        model=None if model is None else several(model), against=against, suite=suite, limit=limit,
        gate=several(gate), task=several(task), task_folder=task_folder, shots=shots, chat=chat, engine=engine,
        base=base, url_model=url_model, allow_overlap=allow_overlap, out=out,
    )  # fmt: skip
    return run_evaluation(request, progress)


@checked
def run_evaluation(request: EvaluationRequest, progress: Progress | None = None) -> EvaluationResult:
    """``evaluate``, with its arguments in one value."""
    progress = progress or default_progress()
    prepared = _prepare(request, progress)
    run = _run_harness if prepared.options else _run_suite
    with scratch.filled(prepared.home):
        return _written(run(prepared, progress), prepared)


@checked
def plan_evaluation(request: EvaluationRequest, progress: Progress | None = None) -> EvaluationPlan:
    """What ``evaluate`` would ask and write, and which gates it can decide; starts no engine and writes nothing.

    request: the arguments of ``evaluate`` in one value.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises what ``evaluate`` would refuse before it starts an engine.
    """
    progress = progress or default_progress()
    prepared = _prepare(request, progress, weights=False)
    scratch.try_folder(prepared.home)
    return _plan_harness(prepared, progress) if prepared.options else _plan_suite(prepared)


@dataclass(frozen=True)
class _PreparedEvaluation:
    """What is asked: a suite, or tasks of the harness. ``reference``: the model that all others are compared with."""

    models: Sequence[EvaluatedModel]
    gates: Sequence[ScoreGate]
    reference: int
    home: Path
    shared: bool  # the scores of all models lie in it
    suite: Suite | None = None
    options: HarnessOptions | None = None

    def records(self, suite: str) -> list[Path]:
        """The file of each model's scores."""
        homes = [self.home if self.shared else model.home for model in self.models]
        names = [model.file_name(suite, shared=self.shared) for model in self.models]
        return distinct([home / name for home, name in zip(homes, names, strict=True)])


def _prepare(request: EvaluationRequest, progress: Progress, *, weights: bool = True) -> _PreparedEvaluation:
    """Everything up to the first engine; ``weights``: also those of the Hub, which engines need."""
    gates = [parse_gate(text) for text in request.gate]
    named = [str(name) for name in request.model] if request.model is not None else [str(runs.latest().path)]
    if not named:
        raise UsageError("model: an empty list, expected one at least")
    against = None if request.against is None else str(request.against)
    models = find_models(named, against, request.base, request.url_model, request.engine, progress, weights=weights)
    refuse_same(models)
    reference, shared = 0 if against is None else -1, bool(request.out)
    home = plain_path(Path(request.out)) if request.out else models[0].home
    limit, suite = request.limit, request.suite
    if options := harness_options(request.task, request.task_folder, request.shots, request.chat, limit, suite):
        return _PreparedEvaluation(models, gates, reference, home, shared, options=options)
    asked = choose_suite(suite, models, limit)
    models = [replace(item, overlap=overlap_of(asked, item, progress, allow=request.allow_overlap)) for item in models]
    refuse_impossible(gates, asked, compared=len(models) > 1)
    return _PreparedEvaluation(models, gates, reference, home, shared, suite=asked)


def choose_suite(
    suite: Named | None, models: Sequence[EvaluatedModel], limit: int | None, *, truth: bool = True
) -> Suite:  # fmt: skip
    """The one that is named, or the held-out rows of the first model's run; ``truth``: something must be expected."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: expected 1 at least")
    if suite is not None:
        return read_suite(Path(suite), limit, truth=truth)
    rows = heldout_rows(models)
    return of_rows(rows, HELD_OUT, SuiteRecipe(str(rows)), rows.parent, limit)


def overlap_of(suite: Suite, model: EvaluatedModel, progress: Progress, *, allow: bool) -> str:
    """What of the suite a model was trained on, in words; InputError where questions were, unless that is allowed."""
    from lora2serve.evaluation.overlap import questions, with_training_rows

    if model.is_base:
        return ""
    overlap = with_training_rows(questions(suite), model.run)
    if overlap.same and not allow:
        raise InputError(f"{suite.source}: {model.name}: {overlap.text}", "--allow-overlap evaluates it all the same")
    if overlap.text and model.run:
        progress.note(f"{model.name}: overlap with its training rows: {overlap.text}")
    return overlap.text


def refuse_impossible(gates: Sequence[ScoreGate], suite: Suite, *, compared: bool) -> None:
    """UsageError for a gate on what nobody measures."""
    from lora2serve.evaluation.suite_evaluation import gated_figures

    refuse_unknown(gates, suite.name, list(gated_figures(suite)), compared=compared)


def _run_suite(prepared: _PreparedEvaluation, progress: Progress) -> Evaluated:
    """Ask and score."""
    from lora2serve.evaluation.suite_evaluation import evaluate_models

    models, suite = prepared.models, prepared.suite
    assert suite is not None
    for note in suite.notes:
        progress.note(note)
    progress.note(f"{suite.name}: {len(suite.items)} items, {len(models)} models; loading the libraries")
    chats, overlaps = [model.chat for model in models], [model.overlap for model in models]
    return evaluate_models(chats, suite, prepared.gates, overlaps, prepared.reference, progress)


def _run_harness(prepared: _PreparedEvaluation, progress: Progress) -> Evaluated:
    """Ask the tasks of lm-evaluation-harness."""
    from lora2serve.evaluation.harness_tasks import evaluate_tasks

    options, subjects = prepared.options, _task_subjects(prepared.models)
    assert options is not None
    progress.note(f"{', '.join(options.tasks)}: {len(subjects)} models; loading the libraries")
    return evaluate_tasks(subjects, options, prepared.gates, prepared.reference, progress)


def _task_subjects(models: Sequence[EvaluatedModel]) -> list[TaskSubject]:
    from lora2serve.evaluation.harness_tasks import TaskSubject

    return [TaskSubject(model.chat, model.run, is_base=model.is_base) for model in models]


def _plan_suite(prepared: _PreparedEvaluation) -> EvaluationPlan:
    from lora2serve.evaluation.suite_evaluation import gated_figures

    suite, names = prepared.suite, [model.name for model in prepared.models]
    assert suite is not None
    figures = {name: of_suite(suite.of_task(task)) for name, (_, task) in gated_figures(suite).items()}
    models = [planned(model, [path]) for model, path in zip(prepared.models, prepared.records(suite.name), strict=True)]
    gates = foreseen(prepared.gates, names, prepared.reference, figures)
    return plan_of_suite("evaluate", suite, models, gates, page_of(prepared.home, suite.name))


def _plan_harness(prepared: _PreparedEvaluation, progress: Progress) -> EvaluationPlan:
    from lora2serve.evaluation.harness_tasks import overlap, prepare_tasks

    options, subjects = prepared.options, _task_subjects(prepared.models)
    assert options is not None
    found = prepare_tasks(options, prepared.gates, compared=len(subjects) > 1)
    overlaps = [overlap(subject, found.texts, progress) for subject in subjects]
    models = [
        planned(replace(model, overlap=text), [path])
        for model, text, path in zip(prepared.models, overlaps, prepared.records(options.name), strict=True)
    ]
    names = [model.name for model in models]
    gates = foreseen(prepared.gates, names, prepared.reference, found.figures)
    return plan_of_tasks(options.name, found.tasks, models, gates, page_of(prepared.home, options.name))


def page_of(home: Path, suite: str) -> Path:
    """The page of a report, in the folder of its scores."""
    from lora2serve.evaluation.report.eval_page import PAGE

    return home / REPORT / suite / PAGE


def distinct(paths: Sequence[Path]) -> list[Path]:
    """Of models that are called alike, ``a/adapter`` and ``b/adapter``, each has its own file."""
    taken: list[Path] = []
    for path in paths:
        number, free = 2, path
        while free in taken:
            number, free = number + 1, path.with_name(f"{path.stem}-{number}{path.suffix}")
        taken.append(free)
    return taken


def _written(done: Evaluated, prepared: _PreparedEvaluation) -> EvaluationResult:
    """The files of each model, also into the registry where it is a version, and the page."""
    from lora2serve.evaluation.report import eval_page

    suite = done.report.suite
    paths = prepared.records(suite)
    for path, model, measured, record in zip(paths, prepared.models, done.measured, done.evaluations, strict=True):
        eval_page.write_record(path, record, measured)
        record_scores(model.name, record)
    rows = [replace(row, record=str(path)) for row, path in zip(done.report.subjects, paths, strict=True)]
    report = replace(done.report, subjects=tuple(rows))
    return EvaluationResult(report, eval_page.write(report, page_of(prepared.home, suite).parent), tuple(paths))
