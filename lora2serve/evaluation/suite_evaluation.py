"""Several models on one suite: asked one after the other, compared item by item, judged by gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora2serve.evaluation import answer_cache, eval_report
from lora2serve.evaluation.eval_records import SuiteEvaluation
from lora2serve.evaluation.eval_report import EvalReport, Figures
from lora2serve.evaluation.score_gates import GateResult, ScoreGate, judge
from lora2serve.evaluation.suite import Suite
from lora2serve.evaluation.suite_run import EngineHost, Measured, evaluation, measure, metric_names
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.progress import Progress

T = TypeVar("T")
TIMES = ("seconds", "first_seconds", "tokens")  # figures of items beside their score


@dataclass(frozen=True)
class Evaluated:
    """All of it, in the order of the models."""

    measured: tuple[Measured, ...]
    evaluations: tuple[SuiteEvaluation, ...]
    report: EvalReport


def evaluate_models(
    models: Sequence[ChatModel], suite: Suite, gates: Sequence[ScoreGate], overlaps: Sequence[str], reference: int,
    progress: Progress,
) -> Evaluated:  # fmt: skip
    """``overlaps``: of each with what it was trained on; ``reference``: the one that all others are compared with."""
    measured, cached = list[Measured](), list[bool]()
    timed = any(gate.margin is not None and gate.metric.endswith("seconds") for gate in gates)
    with EngineHost(progress) as host:
        for model in models:
            answered, from_cache = _answers(host, model, suite, progress, timed=timed)
            measured.append(answered)
            cached.append(from_cache)
    evaluations = [evaluation(item, suite, overlap) for item, overlap in zip(measured, overlaps, strict=True)]
    rows = [
        eval_report.subject_row(item, record, "", cached=known)
        for item, record, known in zip(measured, evaluations, cached, strict=True)
    ]
    old = measured[reference] if len(measured) > 1 else None
    others = [item for item in measured if item is not old]
    metrics = metric_names(suite)
    report = EvalReport(
        suite=suite.name, suite_sha256=suite.sha256, items=len(suite.items), scorer=suite.scorer.kind,
        created=evaluations[0].created, versions=evaluations[0].versions, subjects=tuple(rows), notes=suite.notes,
        differences=tuple(found for item in others if old for found in eval_report.differences(item, old, metrics)),
        changes=tuple(change for item in others if old for change in eval_report.changes(item, old)),
        gates=tuple(gate_results(gates, measured, reference, gated_figures(suite))),
    )  # fmt: skip
    return Evaluated(tuple(measured), tuple(evaluations), report)


def gated_figures(suite: Suite) -> Figures:
    """What a gate may name."""
    scores = {name: ("score", task) for name, task in metric_names(suite).items()}
    return {**scores, **{name: (name, None) for name in TIMES}}


def gate_results(
    gates: Sequence[ScoreGate], models: Sequence[Measured], reference: int, figures: Figures
) -> list[GateResult]:
    """Of each gate for each of its subjects."""
    results = []
    first = models[reference] if len(models) > 1 else None
    for gate in gates:
        metric, task = figures[gate.metric]
        old = first.vector(metric, task) if first else None
        subjects = subjects_of(gate, models, reference)
        if first and gate.margin is not None and (failed := first.failed(task)):
            reason = f"{failed} items were not answered by {first.name}, so that nothing is to be compared with"
            results += [GateResult(gate.text, new.name, "not enough items", reason) for new in subjects]
            continue
        results += [judge(gate, new.name, new.vector(metric, task), old, new.groups(task)) for new in subjects]
    return results


def subjects_of(gate: ScoreGate, models: Sequence[T], reference: int) -> list[T]:
    """Those that a gate is for; the one that all are compared with only if it was named, and of what it is alone."""
    alone = len(models) == 1 or (reference == 0 and gate.margin is None)
    return [model for number, model in enumerate(models) if alone or number != reference % len(models)]


def _answers(
    host: EngineHost, model: ChatModel, suite: Suite, progress: Progress, *, timed: bool
) -> tuple[Measured, bool]:  # fmt: skip
    """A base's are kept for the next time, where chance has no part in them. ``timed``: its seconds count, and those of
    another day would be held against today's.
    """
    path = answer_cache.cache_path(model, suite.sha256) if suite.decoding.temperature == 0 else None
    known = None if timed else answer_cache.load(path, model.name)
    if known:
        progress.note(f"{model.name}: its answers to this suite are known from before")
        return known, True
    measured = measure(host, model, suite, progress)
    if problem := answer_cache.save(path, measured):
        progress.note(problem)
    return measured, False
