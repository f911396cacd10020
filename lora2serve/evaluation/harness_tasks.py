"""Standard tasks (MMLU, ARC, GSM8K ...) as a suite: the harness asks our engines, and its samples become our items."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.artifacts.run import Run
from lora2serve.errors import EngineError, InputError
from lora2serve.evaluation import answer_cache, eval_report
from lora2serve.evaluation.answerer import ProcessTaskAnswerer, TaskAnswerer
from lora2serve.evaluation.eval_records import ItemResult, SuiteEvaluation
from lora2serve.evaluation.eval_report import EvalReport, Figures
from lora2serve.evaluation.harness_options import HarnessOptions, plain_name
from lora2serve.evaluation.overlap import with_training_rows
from lora2serve.evaluation.score_gates import ScoreGate, refuse_unknown
from lora2serve.evaluation.suite_evaluation import Evaluated, gate_results
from lora2serve.evaluation.suite_run import EngineHost, Measured, library_versions, now, score_figures
from lora2serve.evaluation.task_rows import (
    PREFERRED,
    SCORER,
    TaskRows,
    find_tasks,
    harness_errors,
    load_tasks,
    questions_sha256,
    read_task_rows,
    same_chance,
    texts_of,
)
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

WORKER = "lora2serve.evaluation.harness_worker:HarnessWorker"
HASHED = ("doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True)
class TaskSubject:
    """A model that is asked, and the run whose rows it was trained on."""

    model: ChatModel
    run: Run | None = None
    is_base: bool = False  # trained by nobody here


@dataclass(frozen=True)
class AskedTasks(JsonRecord):
    """``suite_sha256`` is the same for the same questions asked the same way."""

    WHOLE: ClassVar[bool] = True

    suite_sha256: str
    metrics: Mapping[str, str]  # task -> the figure that its score is
    texts: Mapping[str, tuple[str, ...]]  # those of each item's row in the task's data set

    @property
    def names(self) -> dict[str, str | None]:
        """The figures: the mean of all, where they are of one kind, and of each task where there are several."""
        return figure_names(self.metrics)


@dataclass(frozen=True)
class HarnessRun:
    """A model's items, each of its task; ``cached``: it answered them before."""

    measured: Measured
    tasks: AskedTasks
    cached: bool = False


def figure_names(metrics: Mapping[str, str]) -> dict[str, str | None]:
    """Of tasks (task -> the figure that its score is): what a gate names -> task."""
    kinds = set(metrics.values())
    names: dict[str, str | None] = {plain_name(kinds.pop()) if len(kinds) == 1 else "score": None}
    if len(metrics) > 1:
        names |= {plain_name(f"{metric}-{task}"): task for task, metric in metrics.items()}
    return names


def run_tasks(
    host: EngineHost, model: ChatModel, options: HarnessOptions, manager: TaskManager, progress: Progress
) -> HarnessRun:
    """Ask one model. EngineError for what the harness or the engine refuses."""
    process, version = host.process(model, WORKER)
    return ask_tasks(ProcessTaskAnswerer(process), version, model, options, manager, progress)


def ask_tasks(
    engine: TaskAnswerer, version: str, model: ChatModel, options: HarnessOptions, manager: TaskManager,
    progress: Progress, numbers: Mapping[str, Sequence[int]] | None = None,
) -> HarnessRun:  # fmt: skip
    """The same of an engine that runs. ``numbers``: only these rows of each task, in their order."""
    from lm_eval.evaluator import evaluate

    from lora2serve.evaluation.lm_eval_bridge import EngineLM

    some = None if numbers is None else {task: list(rows) for task, rows in numbers.items()}
    with progress.track(f"{model.name}: {', '.join(options.tasks)}", 0) as advance, harness_errors(), same_chance():
        lm = EngineLM(engine, base=model.without_adapter, advance=advance)
        results = evaluate(
            lm, load_tasks(options, manager), limit=options.limit if some is None else None, samples=some,
            apply_chat_template=options.chat, fewshot_as_multiturn=True, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    samples: Mapping[str, Sequence[Mapping[str, object]]] = results["samples"]
    metrics = {task: _metric(task, lines, results["higher_is_better"][task]) for task, lines in samples.items()}
    pairs = [(task, line) for task, lines in samples.items() for line in _once(lines)]
    items = [_item(task, line, metrics[task], lm.seconds_of(line["arguments"])) for task, line in pairs]
    asked = {item_name(task, line["doc_id"]): tuple(texts_of(line["doc"])) for task, line in pairs}
    content = {
        "tasks": {task: [[line[key] for key in HASHED] for line in _once(lines)] for task, lines in samples.items()},
        "versions": {task: str(number) for task, number in results["versions"].items()},
        "shots": {task: str(number) for task, number in results["n-shot"].items()}, "metrics": metrics,
    }  # fmt: skip
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return HarnessRun(Measured(model.name, version, tuple(items)), AskedTasks(sha256, metrics, asked))


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks with their rows, before a model is loaded."""

    manager: TaskManager
    tasks: tuple[TaskRows, ...]

    @property
    def names(self) -> dict[str, str | None]:
        """The figures, as ``AskedTasks`` has them."""
        return figure_names({task.name: task.metric for task in self.tasks})

    @property
    def figures(self) -> dict[str, list[tuple[str, str]]]:
        """The items that each is of, by name and group, of which they have none."""
        return {
            name: [(item, "") for task in self.tasks if only in (None, task.name) for item in self._items(task)]
            for name, only in self.names.items()
        }

    @property
    def texts(self) -> dict[str, tuple[str, ...]]:
        """Those of each item's row."""
        return {item: texts for task in self.tasks for item, texts in zip(self._items(task), task.texts, strict=True)}

    def _items(self, task: TaskRows) -> list[str]:
        return [item_name(task.name, row) for row in range(len(task.rows))]


def prepare_tasks(options: HarnessOptions, gates: Sequence[ScoreGate], *, compared: bool) -> PreparedTasks:
    """UsageError for tasks and gates that cannot be."""
    manager = find_tasks(options)
    prepared = PreparedTasks(manager, tuple(read_task_rows(options, manager)))
    refuse_unknown(gates, options.name, list(prepared.names), compared=compared)
    return prepared


def evaluate_tasks(
    subjects: Sequence[TaskSubject], options: HarnessOptions, gates: Sequence[ScoreGate], reference: int,
    progress: Progress,
) -> Evaluated:  # fmt: skip
    """As ``suite_evaluation.evaluate_models``; what the tasks' figures are called is known once they are measured."""
    found, name = prepare_tasks(options, gates, compared=len(subjects) > 1), options.name
    questions = questions_sha256(options, found.tasks)
    with EngineHost(progress) as host:
        runs = [_answers(host, subject.model, options, found.manager, questions, progress) for subject in subjects]
    if len({run.tasks.suite_sha256 for run in runs}) > 1:
        raise EngineError(f"{name}: the models were not asked the same: their chat templates differ", "without --chat")
    names, measured = runs[0].tasks.names, [run.measured for run in runs]
    figures: Figures = {metric: ("score", task) for metric, task in names.items()}
    refuse_unknown(gates, name, list(figures), compared=len(subjects) > 1)
    overlaps = [overlap(subject, run.tasks.texts, progress) for subject, run in zip(subjects, runs, strict=True)]
    evaluations = [
        SuiteEvaluation(
            suite=name, suite_sha256=runs[0].tasks.suite_sha256, engine=item.engine, created=now(), subject=item.name,
            metrics=score_figures(item, names), items=len(item.items), scorer=SCORER, versions=library_versions(),
            overlap=overlap,
        )
        for item, overlap in zip(measured, overlaps, strict=True)
    ]  # fmt: skip
    asked = zip(runs, evaluations, strict=True)
    old = measured[reference] if len(measured) > 1 else None
    others = [item for item in measured if item is not old]
    report = EvalReport(
        suite=name, suite_sha256=runs[0].tasks.suite_sha256, items=len(measured[0].items), scorer=SCORER,
        created=evaluations[0].created, versions=evaluations[0].versions,
        subjects=tuple(eval_report.subject_row(run.measured, row, "", cached=run.cached) for run, row in asked),
        differences=tuple(found for item in others if old for found in eval_report.differences(item, old, names)),
        changes=tuple(change for item in others if old for change in eval_report.changes(item, old)),
        gates=tuple(gate_results(gates, measured, reference, figures)),
    )  # fmt: skip
    return Evaluated(tuple(measured), tuple(evaluations), report)


def _answers(
    host: EngineHost, model: ChatModel, options: HarnessOptions, manager: TaskManager, questions: str,
    progress: Progress,
) -> HarnessRun:  # fmt: skip
    """A base's are kept for the next time."""
    path = answer_cache.cache_path(model, questions)
    if known := answer_cache.load_more(path, model.name):
        try:
            run = HarnessRun(known[0], AskedTasks.from_json(known[1], str(path)), cached=True)
        except InputError:  # of another version
            pass
        else:
            progress.note(f"{model.name}: its answers to these tasks are known from before")
            return run
    run = run_tasks(host, model, options, manager, progress)
    if problem := answer_cache.save(path, run.measured, run.tasks.to_json()):
        progress.note(problem)
    return run


def overlap(subject: TaskSubject, texts: Mapping[str, Sequence[str]], progress: Progress) -> str:
    """What of the tasks a model was trained on, in words: it is told, as their rows are the harness's.

    texts: those of each item's row, by the item's name.
    """
    if subject.is_base:
        return ""
    text = with_training_rows(texts, subject.run).text
    if text and subject.run:
        progress.warn(f"{subject.model.name}: overlap with its training rows: {text}")
    return text


def item_name(task: str, row: object) -> str:
    """Of the item that a row of a task is, by its number."""
    return f"{task}-{row}"


def _once(lines: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Of a task with several filters, the lines of the first."""
    first = lines[0].get("filter") if lines else None
    return [line for line in lines if line.get("filter") == first]


def _metric(task: str, lines: Sequence[Mapping[str, object]], better: Mapping[str, object]) -> str:
    """One that every item has, and of which more is better: that is what verdicts and gates take it for."""
    names = [str(name) for name in _listed(lines[0]["metrics"])]
    known = [name for name in names if better.get(name) and isinstance(lines[0].get(name), Real)]
    if not known:
        raise EngineError(
            f"task {task}: none of {', '.join(names)} is a figure of each item, of which more is better",
            "take another task",
        )
    return next((name for name in PREFERRED if name in known), known[0])


def _item(task: str, line: Mapping[str, object], metric: str, seconds: float) -> ItemResult:
    score, answers = line.get(metric), _listed(line["filtered_resps"])
    if not isinstance(score, Real) or not math.isfinite(score):
        raise EngineError(f"task {task}: {item_name(task, line['doc_id'])}: {metric} is {score}, expected a number")
    pairs = [_listed(answer) for answer in answers]
    likelihoods = tuple(float(str(pair[0])) for pair in pairs if len(pair) == 2)
    asked = line.get("arguments")
    return ItemResult(
        item_name(task, line["doc_id"]), str(line["prompt_hash"]), "" if likelihoods else str(answers[0]),
        float(score), round(seconds, 4),
        task=task, likelihoods=likelihoods, question=_question(asked), expected=(str(line["target"]),),
    )  # fmt: skip


def _question(asked: object) -> str:
    """The end of the context of the first request."""
    while isinstance(asked, dict | list | tuple) and asked:
        asked = next(iter(asked.values())) if isinstance(asked, dict) else asked[0]
    return str(asked or "")[-500:]


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]
