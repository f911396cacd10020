"""What parity would compare and ask, before any engine is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from lora2serve.artifacts.parity_report import ComparisonResult, GateName, ReferenceName
from lora2serve.data.data_sets import DataSet
from lora2serve.data.prompts import CONVERSATIONS, PROBES, PromptOptions
from lora2serve.parity_check import settings_check, thresholds
from lora2serve.parity_check.comparisons import Comparison
from lora2serve.parity_check.installed_engines import EngineState, engine_state
from lora2serve.parity_check.trained_model import TrainedModel

TRAINED_IN = "peft"  # the engine of the trained model


@dataclass(frozen=True)
class PlannedComparison:
    """An export in one engine, None where only its settings are compared.

    ``bounds``: figure -> what would be held against it; ``unjudged``: figure -> why its bound would not be.
    """

    export: str
    target: str
    kind: str  # the row of the table of thresholds
    engine: EngineState | None
    reference: ReferenceName
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
    """What ``run_parity`` would do. ``lost``: rows of the baseline that would be missing; ``page`` shows the report.

    ``trained_in`` and ``prompts`` are None where no engine would be asked.
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


def of_settings(origin: TrainedModel, exports: Sequence[Path], page: Path) -> ParityPlan:
    """Of the settings gate alone."""
    rows = settings_check.unchecked_rows(origin, exports)
    return _plan(origin, [_planned(row, None, ("settings",)) for row in rows], page)


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
        row = settings_check.empty_row(origin, comparison)
        planned.append(_planned(row, state(comparison.engine), comparison.gates, bounds, unjudged))
    rows = len(held_out.rows) if held_out else 0
    source, conversations = str(origin.rows) if rows else "", min(rows, CONVERSATIONS) + len(PROBES)
    return replace(
        _plan(origin, planned, page),
        references=origin.references,
        trained_in=state(TRAINED_IN),
        prompts=PlannedPrompts(source, rows, conversations, origin.amount),
    )


def _plan(origin: TrainedModel, planned: Sequence[PlannedComparison], page: Path) -> ParityPlan:
    adapters = tuple(map(str, origin.adapters))
    return ParityPlan(origin.name, str(origin.base), adapters, tuple(planned), str(page))


def _planned(
    row: ComparisonResult, engine: EngineState | None, gates: tuple[GateName, ...],
    bounds: Mapping[str, float] = {}, unjudged: Mapping[str, str] = {},
) -> PlannedComparison:  # fmt: skip
    return PlannedComparison(
        row.export, row.target, row.kind, engine, row.reference, row.required, gates, bounds, unjudged
    )  # fmt: skip


def _bounds(origin: TrainedModel, comparison: Comparison) -> dict[str, float]:
    """Without those of what would not be measured."""
    bounds = thresholds.lookup(comparison.kind, origin.settings.thresholds).by_figure()
    measured = {
        "retention": bool(origin.adapters), "tensor_nmse": comparison.path is not None,
        "long_kl": origin.settings.long > 0,
    }  # fmt: skip
    return {name: bound for name, bound in bounds.items() if bound is not None and measured.get(name, True)}
