"""What parity would compare and ask, before any engine is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from lora2serve.artifacts.parity_report import GateName, ReferenceName
from lora2serve.data.data_sets import DataSet
from lora2serve.data.prompts import CONVERSATIONS, PROBES, PromptOptions
from lora2serve.parity_check import settings_check, thresholds
from lora2serve.parity_check.comparisons import Comparison
from lora2serve.parity_check.installed_engines import EngineState, engine_state
from lora2serve.parity_check.trained_model import TrainedModel

TRAINED_IN = "peft"  # the engine of the trained model


@dataclass(frozen=True)
class PlannedComparison:
    """An export in one engine. ``engine`` and ``reference`` are None where only its settings are compared.

    ``kind``: its format, which has the bounds; ``required``: a missing engine fails parity. ``bounds``: figure -> what
    would be held against it, as in report.json, where ``retention`` is the share of the adapter's signal that is lost;
    ``unjudged``: figure -> why its bound would not be.
    """

    export: str
    target: str
    kind: str
    engine: EngineState | None
    reference: ReferenceName | None
    required: bool
    gates: tuple[GateName, ...]
    bounds: Mapping[str, float] = field(default_factory=dict)
    unjudged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPrompts:
    """What every engine would be asked: ``rows`` held-out ones of ``source``, and general text.

    ``conversations``: at most, for the tokens gate.
    """

    source: str
    rows: int
    conversations: int
    amount: PromptOptions


@dataclass(frozen=True)
class ParityPlan:
    """What ``parity`` would do.

    ``base`` and ``adapters``: the directories that the trained model is made of; ``page``: the file that would show the
    report. ``references``: the base that the trained model would be measured on, "original" in full precision,
    "trained" as the training quantized it; ``trained_in``: the engine for that; it and ``prompts`` are None where no
    engine would be asked. ``ask``: the question of the request; ``baseline``: its earlier report, of which ``lost`` are
    the rows that would be missing. ``unmet``: why parity cannot be met, as far as that is known now.
    """

    model: str
    base: str
    adapters: tuple[str, ...]
    comparisons: tuple[PlannedComparison, ...]
    page: str
    references: tuple[ReferenceName, ...] = ()
    trained_in: EngineState | None = None
    prompts: PlannedPrompts | None = None
    ask: str = ""
    baseline: str = ""
    lost: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()


def of_settings(origin: TrainedModel, exports: Sequence[Path], page: Path) -> ParityPlan:
    """Of the settings gate alone."""
    rows = settings_check.unchecked_rows(origin, exports)
    planned = [PlannedComparison(row.export, row.target, row.kind, None, None, False, ("settings",)) for row in rows]
    return _plan(origin, planned, page)


def of_engines(
    origin: TrainedModel, comparisons: Sequence[Comparison], held_out: DataSet | None, page: Path
) -> ParityPlan:
    """Of all gates, with the rows that were held out, if there are any; each engine is looked for once."""
    from lora2serve.parity_check.metrics import too_few  # numpy, before which parity says what it does

    state = cache(engine_state)
    planned = []
    for comparison in comparisons:
        bounds = _bounds(origin, comparison)
        unjudged = {name: why for name in bounds if (why := too_few(name, origin.settings.tokens))}
        required = comparison.engine in origin.settings.require
        planned.append(PlannedComparison(
            comparison.name, comparison.target, comparison.kind, state(comparison.engine), comparison.reference,
            required, comparison.gates, bounds, unjudged,
        ))  # fmt: skip
    rows = len(held_out.rows) if held_out else 0
    source, conversations = str(origin.rows) if rows else "", min(rows, CONVERSATIONS) + len(PROBES)
    return replace(
        _plan(origin, planned, page),
        references=origin.references,
        trained_in=state(TRAINED_IN),
        prompts=PlannedPrompts(source, rows, conversations, origin.amount),
        unmet=tuple(_unmet(planned, state(TRAINED_IN))),
    )


def _unmet(planned: Sequence[PlannedComparison], trained_in: EngineState) -> Iterator[str]:
    """Why parity fails whatever the exports are."""
    if trained_in.missing:
        yield f"the trained model needs {trained_in.name}, which is not here"
    missing = [item for item in planned if item.engine and item.engine.missing]
    for name in dict.fromkeys(item.engine.name for item in missing if item.engine and item.required):
        yield f"{name} is required and is not here"
    if len(missing) == len(planned):
        yield "no engine of these exports is here, so that nothing would be compared"


def _plan(origin: TrainedModel, planned: Sequence[PlannedComparison], page: Path) -> ParityPlan:
    adapters = tuple(map(str, origin.adapters))
    return ParityPlan(origin.name, str(origin.base), adapters, tuple(planned), str(page))


def _bounds(origin: TrainedModel, comparison: Comparison) -> dict[str, float]:
    """Without those of what would not be measured."""
    bounds = thresholds.lookup(comparison.kind, origin.settings.thresholds).by_figure()
    measured = {
        "retention": bool(origin.adapters), "tensor_nmse": comparison.path is not None,
        "long_kl": origin.settings.long > 0,
    }  # fmt: skip
    return {name: bound for name, bound in bounds.items() if bound is not None and measured.get(name, True)}
