"""Standard tasks that a sweep judges by: some of their rows for all trials, the others for the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.data.data_sets import DataSets
from lora2serve.errors import EngineError, InputError, UsageError
from lora2serve.evaluation.answerer import TaskAnswerer
from lora2serve.evaluation.harness_options import HarnessOptions
from lora2serve.evaluation.harness_tasks import ask_tasks
from lora2serve.evaluation.overlap import compare
from lora2serve.evaluation.task_rows import TaskRows, find_tasks, questions_sha256, read_task_rows
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.progress import Progress, Silent
from lora2serve.sweeping.sweep_quality import Quality
from lora2serve.sweeping.trial_files import FEWEST_HELD_OUT, MOST_SEARCH_ROWS, halves
from lora2serve.sweeping.trial_record import RowLoss

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class TaskPart:
    """Rows of each task, by their numbers; ``metrics``: the figure that each task's score is."""

    options: HarnessOptions
    numbers: Mapping[str, tuple[int, ...]]
    metrics: Mapping[str, str]
    sha256: str

    def losses(self, engine: TaskAnswerer, version: str, model: ChatModel) -> RowLoss:
        """Of each row 1 - score, as ``lora2serve evaluate --task`` scores that model; EngineError for no such score."""
        run = ask_tasks(engine, version, model, self.options, _manager(self.options), Silent(), self.numbers)
        if (found := dict(run.tasks.metrics)) != dict(self.metrics):
            raise EngineError(f"{self.options.name}: {found} of each row, expected {dict(self.metrics)}")
        for item in run.measured.items:
            if not 0 <= item.score <= 1:
                raise EngineError(f"task {item.task}: {item.id} scores {item.score:g}, expected 0 to 1")
        losses = tuple(1 - item.score for item in run.measured.items)
        return RowLoss(losses, (1,) * len(losses), scored=True)


def task_quality(options: HarnessOptions, sets: DataSets, progress: Progress) -> Quality:
    """Of ``--task``; what is asked and was trained on is told, as the rows are the harness's.

    UsageError for tasks that are not there, or too small to be split; EngineError where their data sets are not here.
    """
    options = replace(options, include=str(Path(options.include).absolute()) if options.include else "")
    tasks = read_task_rows(options, _manager(options))
    asked = {f"{task.name}-{number}": texts for task in tasks for number, texts in enumerate(task.texts)}
    if text := compare(asked, sets.train.rows).text:
        progress.warn(f"{options.name}: overlap with the training rows: {text}")
    search, final = _split(options, tasks)
    metrics = set(search.metrics.values())
    metric = metrics.pop() if len(metrics) == 1 else "score"
    return Quality(options.name, metric, "", search.sha256, final.sha256, options)


def read_task_part(options: HarnessOptions, *, final: bool, sha256: str) -> TaskPart:
    """Those rows; InputError where they are others than when the sweep began."""
    part = _split(options, read_task_rows(options, _manager(options)))[final]
    if part.sha256 != sha256:
        raise InputError(
            f"{options.name}: changed since the sweep began, and scores of other rows do not compare",
            "put it back, or begin another sweep with --name",
        )
    return part


def _split(options: HarnessOptions, tasks: Sequence[TaskRows]) -> tuple[TaskPart, TaskPart]:
    """Rows of every task are in both parts; the same row twice is not torn apart."""
    most = max(1, MOST_SEARCH_ROWS // max(1, len(tasks)))
    parts = {task.name: halves(task.rows, most) for task in tasks}
    different = sum(len(set(task.rows)) for task in tasks)
    if small := [name for name, (search, final) in parts.items() if not (search and final)]:
        raise UsageError(f"--task {small[0]}: too few different rows to be split: half of them are for the end")
    if different < FEWEST_HELD_OUT:
        raise UsageError(
            f"--task {options.name}: {different} different rows, expected {FEWEST_HELD_OUT} at least: half of them "
            "are for the end", "raise --limit, or take more tasks",
        )  # fmt: skip
    search, final = (_part(options, tasks, {name: tuple(part[end]) for name, part in parts.items()}) for end in (0, 1))
    return search, final


def _part(options: HarnessOptions, tasks: Sequence[TaskRows], numbers: Mapping[str, tuple[int, ...]]) -> TaskPart:
    metrics = {task.name: task.metric for task in tasks}
    return TaskPart(options, numbers, metrics, questions_sha256(options, tasks, numbers))


def _manager(options: HarnessOptions) -> TaskManager:
    return _found(options.tasks, options.include)


@cache
def _found(tasks: tuple[str, ...], include: str) -> TaskManager:
    """Those of a folder beside the harness's own 14,000, which are read again with them: once a process."""
    return find_tasks(HarnessOptions(tasks, include))
