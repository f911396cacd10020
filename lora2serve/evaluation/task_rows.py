"""Rows of standard tasks before a model answers them: how many there are, and whether they are still the same."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.errors import EngineError, Lora2ServeError, UsageError, did_you_mean, first_line, raise_all
from lora2serve.evaluation.harness_options import HarnessOptions

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

PREFERRED = ("acc", "exact_match", "f1", "mcc", "pass@1", "prompt_level_strict_acc")  # of a task with several figures
EXAMPLES_SEED = 1234  # as the harness's own command draws them
EMPTY = "its test_split, or validation_split, names an empty part, or process_docs leaves nothing"
SCORER = "lm-eval"  # of every task, in reports
FEWEST_WORDS = 4  # of a text by which a row is known again
ELSEWHERE = (
    "dataset_path",
    "dataset_kwargs",
    "metadata",
)  # of a task's settings: where its rows are, not what is asked
HAS_ROWS = {"dataset_path", "custom_dataset", "class"}  # settings of a task that a group itself writes down
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function in this process


@dataclass(frozen=True)
class TaskRows:
    """One task. ``rows`` are JSON; ``texts`` those of each by which it is known again, and ``settings`` the task's."""

    name: str
    metric: str  # the figure that its score is
    rows: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    settings: str


def find_tasks(options: HarnessOptions) -> TaskManager:
    """The harness's tasks; UsageError for one that it does not have."""
    from lm_eval.tasks import TaskManager

    if options.include and not Path(options.include).is_dir():
        raise UsageError(f"--task-folder {options.include}: no such folder")
    alone: list[str] = []
    if options.include:
        manager = TaskManager(include_path=options.include, include_defaults=False)
        if set(options.tasks) <= set(manager.all_subtasks):  # of a group some may be the harness's
            return manager
        alone = manager.all_subtasks
        known = sorted({*manager.all_tasks, *_own_tasks().all_tasks})
    else:
        known = _own_tasks().all_tasks
    for task in options.tasks:
        if task not in known:
            _refuse_broken(options.include)  # the harness passes over those
            own = ", ".join(alone)
            hint = f"{options.include} has {own}" if own else "`lm-eval ls tasks` lists them"
            raise UsageError(f"--task {task}: no such task{did_you_mean(task, known)}", hint)
    manager = TaskManager(include_path=options.include) if options.include else _own_tasks()
    raise_all([line for task in options.tasks for line in gone_members(task, manager)], _unknown_members)
    return manager


def gone_members(task: str, manager: TaskManager) -> Iterator[str]:
    """What a group and those in it list and nobody has, a line each: the harness takes it for a task without rows."""
    known: Mapping[str, Entry] = manager.task_index
    seen = set[str]()

    def look(config: Mapping[str, object], path: object, above: Mapping[str, object]) -> Iterator[str]:
        members = config.get("task")
        if not isinstance(members, list):
            return
        shared = {**above, **{key: value for key, value in config.items() if key not in ("group", "task")}}
        for member in members:
            own = member if isinstance(member, dict) else {"task": member}
            name = str(own.get("group", own.get("task")))
            if name in known:
                yield from look_at(name, shared)
            elif "group" in own:
                yield from look(own, path, shared)
            elif not HAS_ROWS & {*shared, *own}:
                yield f"--task {task}: {path} lists {name}: no such task{did_you_mean(name, known)}"

    def look_at(name: str, above: Mapping[str, object]) -> Iterator[str]:
        if name not in seen:
            seen.add(name)
            yield from look(known[name].cfg or {}, known[name].yaml_path, above)

    return look_at(task, {})


def _unknown_members(lines: str) -> UsageError:
    return UsageError(lines, "take it out there, or bring the task back")


@cache
def _own_tasks() -> TaskManager:
    """The harness lists its own 14,000 in twenty seconds: once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _refuse_broken(folder: str) -> None:
    """UsageError for a file of tasks there that is no YAML; what its tags stand for is the harness's."""
    import yaml

    for path in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            for _ in yaml.parse(path.read_text(encoding="utf-8")):
                pass
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
            line = f":{mark.line + 1}" if mark else ""
            raise UsageError(f"{path}{line}: no YAML: {problem}", "mend it, or move it") from None


def read_task_rows(options: HarnessOptions, manager: TaskManager) -> list[TaskRows]:
    """Of each task, those of groups one by one; as far as ``limit`` goes.

    UsageError for a task whose figure is none of each row, EngineError where its data set is not here.
    """
    with harness_errors(), same_chance():
        loaded = load_tasks(options, manager)["tasks"]
        return [_task_rows(name, task, options.limit) for name, task in loaded.items()]


def load_tasks(options: HarnessOptions, manager: TaskManager) -> dict[str, dict[str, Task]]:
    """Ready to be asked, with as many examples as are wanted: 0 in a task's own settings stays.

    The harness's ``simple_evaluate`` does that, too, then asks git and pip about this machine: three seconds a model.
    """
    import datasets

    datasets.disable_progress_bars()
    names = ", ".join(options.tasks)
    try:
        loaded: dict[str, dict[str, Task]] = manager.load(list(options.tasks))
    except IndexError as error:  # the harness looks at the first one
        raise UsageError(f"--task {names}: no rows: {first_line(error)}", EMPTY) from None
    except KeyError as error:
        if error.args != (None,):
            raise
        raise UsageError(f"--task {names}: a metric that lm-eval has not", "see metric_list of the task") from None
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", own if own == 0 or options.shots is None else options.shots)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=EXAMPLES_SEED)
    return loaded


def questions_sha256(
    options: HarnessOptions, tasks: Sequence[TaskRows], numbers: Mapping[str, Sequence[int]] | None = None
) -> str:
    """Of what is asked, and how; ``numbers``: only these rows of each task."""
    rows = {
        task.name: [task.settings, *(task.rows[n] for n in (numbers[task.name] if numbers else range(len(task.rows))))]
        for task in tasks
    }
    content = json.dumps([rows, {task.name: task.metric for task in tasks}, options.shots, options.chat])
    return hashlib.sha256(content.encode()).hexdigest()


def texts_of(value: object) -> Iterator[str]:
    """The texts of a row that are long enough to be known again."""
    if isinstance(value, str) and len(value.split()) >= FEWEST_WORDS:
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts_of(item)


@contextmanager
def same_chance() -> Iterator[None]:
    """Many tasks shuffle their choices by Python's or numpy's common generator: the same way each time, as the harness
    has it. What the process draws later is as without us.
    """
    import numpy

    before, numbers = random.getstate(), numpy.random.get_state()
    random.seed(0)
    numpy.random.seed(EXAMPLES_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        numpy.random.set_state(numbers)


@contextmanager
def harness_errors() -> Iterator[None]:
    """What the harness raises, as ours: its data sets come from the Hub, and raise what they like."""
    try:
        yield
    except Lora2ServeError:
        raise
    except Exception as error:
        hint = "its data set must be here: HF_HUB_OFFLINE, or no network" if "ffline" in str(error) else ""
        raise EngineError(f"lm-eval: {type(error).__name__}: {first_line(error)}", hint) from error


def _task_rows(name: str, task: Task, limit: int | None) -> TaskRows:
    metric, docs = _figure(name, task), list(islice(task.eval_docs, limit))
    if not docs:
        raise UsageError(f"--task {name}: no rows", EMPTY)
    settings = {key: value for key, value in task.dump_config().items() if key not in ELSEWHERE}
    return TaskRows(
        name, metric, tuple(_plain(doc) for doc in docs), tuple(tuple(texts_of(doc)) for doc in docs),
        _plain([task.VERSION, settings]),
    )  # fmt: skip


def _figure(name: str, task: Task) -> str:
    """As ``harness_tasks`` takes it once there are answers."""
    kinds: dict[str, bool] = task.higher_is_better() or {}
    figure = next((known for known in PREFERRED if known in kinds), next(iter(kinds), ""))
    if not kinds.get(figure):
        raise UsageError(
            f"--task {name}: {figure or 'no figure'}, expected one of each row, of which more is better",
            f"such as {', '.join(PREFERRED[:3])}",
        )
    return figure


def _plain(value: object) -> str:
    return ADDRESS.sub("", json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))
