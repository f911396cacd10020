"""The settings gate of several exports: alone, in this process, or before the engines, in a worker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora2serve.artifacts import manifest
from lora2serve.artifacts.manifest import ADAPTER_TARGETS
from lora2serve.artifacts.parity_report import ComparisonResult, Gate, ParityReport, SettingDifference
from lora2serve.errors import EngineError
from lora2serve.parity_check import foreign_export, thresholds
from lora2serve.parity_check.comparisons import Comparison, nothing_to_compare
from lora2serve.parity_check.export_sizes import size_of, weights_of
from lora2serve.parity_check.settings_gate import SettingsComparator, SettingsResult
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.progress import Progress
from lora2serve.system import scratch


def report(origin: TrainedModel, exports: Sequence[Path], progress: Progress) -> ParityReport:
    """On the settings alone, in this process: a row for each export, no engine and no reference."""
    rows = []
    comparator = SettingsComparator(origin.json(), origin.settings.allow)
    for path, unchecked in zip(exports, unchecked_rows(origin, exports), strict=True):
        started, checked = time.monotonic(), comparator.check(path)
        row = replace(
            unchecked,
            gates=(checked.gate,),
            settings=checked.differences,
            not_compared=checked.not_compared,
            seconds=round(time.monotonic() - started, 2),
        )
        rows.append(row)
        progress.note(f"{row.export}: settings {row.status} ({row.seconds:.1f} s)")
    _warn_unused(origin, [row.settings for row in rows], progress)
    return ParityReport(run=origin.name, versions=manifest.versions(), rows=tuple(rows))


def unchecked_rows(origin: TrainedModel, exports: Sequence[Path]) -> list[ComparisonResult]:
    """The row of each export without its gate; UsageError where there is none, InputError for what is no export."""
    if not exports:
        raise nothing_to_compare(origin)
    records = [(path, foreign_export.manifest_of(path, origin.name)) for path in exports]
    return [
        ComparisonResult(export=path.name, target=record.target, kind=thresholds.kind_of(record), size=size_of(path))
        for path, record in records
    ]


def before_engines(
    origin: TrainedModel, comparisons: Sequence[Comparison], progress: Progress
) -> dict[Path, SettingsResult]:
    """Every export's verdict, in a worker: what plans a chat template loads transformers."""
    from lora2serve.parity_check.engine_process import EngineProcess

    paths = list(dict.fromkeys(comparison.path for comparison in comparisons if comparison.path))
    if not paths:
        return {}
    options = {"origin": origin.json(), "allow": list(origin.settings.allow)}
    checked: dict[Path, SettingsResult] = {}
    with progress.track("settings", len(paths)) as advance:
        while len(checked) < len(paths):  # a worker ends with what it fails at; another one goes on behind that
            try:
                log = scratch.log_file("settings")
                with EngineProcess("settings", options, log, origin.settings.limit) as worker:
                    for path in paths[len(checked) :]:
                        checked[path] = SettingsResult.from_json(worker.call("settings", export=str(path)), "settings")
                        advance(1)
            except EngineError as error:
                failed = SettingsResult(Gate("settings", "failed", (), error.message, error.hint))
                checked[paths[len(checked)]] = failed
                advance(1)
    _warn_unused(origin, [result.differences for result in checked.values()], progress)
    return checked


def first_row(origin: TrainedModel, comparison: Comparison, results: Mapping[Path, SettingsResult]) -> ComparisonResult:
    """The row of a comparison with its settings gate; where that is not met, the others are skipped."""
    row = ComparisonResult(
        export=comparison.name,
        target=comparison.target,
        kind=comparison.kind,
        engine=comparison.engine,
        reference=comparison.reference,
        required=comparison.engine in origin.settings.require,
    )
    if comparison.path is None:  # a deployment
        return row
    checked = results[comparison.path]
    met = checked.gate.status in ("met", "skipped")
    rest = () if met else tuple(Gate(name, "skipped") for name in comparison.gates[1:])
    return replace(
        row,
        gates=(checked.gate, *rest),
        settings=checked.differences,
        not_compared=checked.not_compared,
        size=size_of(comparison.path),
        base_size=weights_of(origin.base) if comparison.target in ADAPTER_TARGETS else 0,
    )


def _warn_unused(origin: TrainedModel, differences: Sequence[Sequence[SettingDifference]], progress: Progress) -> None:
    used = {difference.allowed for each in differences for difference in each}
    for pattern in origin.settings.allow:
        if pattern not in used:
            progress.warn(f"allow {pattern}: no setting that differs is named so")
