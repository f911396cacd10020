"""``--baseline``: what got worse than in an earlier report, beyond noise."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora2serve.artifacts.metric_table import higher_is_better
from lora2serve.artifacts.parity_report import FORMAT, ComparisonResult, Metric, ParityReport
from lora2serve.errors import InputError

COMPARED = ("mean_kl", "p99_kl", "top1", "retention", "equal_answers", "tensor_nmse")
SMALLEST = 1e-6  # below, a difference is one of arithmetic (nats, or a share)


def read_baseline(path: Path) -> ParityReport:
    """The earlier report; InputError where the file is none."""
    try:
        return ParityReport.read(path)
    except InputError as error:
        raise InputError(
            f"{path}: not a report.json of format {FORMAT} ({error.message})", "`lora2serve parity` writes one"
        ) from None


def regressions(report: ParityReport, earlier: ParityReport, source: str) -> tuple[str, ...]:
    """One line for each figure whose interval lies wholly on the worse side of the earlier one's, and for lost rows.

    ``source``: where the earlier report was, in words.
    """
    before, now = (({(row.export, row.engine): row for row in item.rows}) for item in (earlier, report))
    lines = list(lost(now, earlier, source))
    for key, row in now.items():
        if key in before:
            lines += _worse(row, before[key])
    return tuple(lines)


def lost(compared: Collection[tuple[str, str]], earlier: ParityReport, source: str) -> tuple[str, ...]:
    """One line for each row of the earlier report that is not ``compared``: its export and engine."""
    before = dict.fromkeys((row.export, row.engine) for row in earlier.rows)
    missing = [row for row in before if row not in compared]
    return tuple(f"{export} in {engine}: in {source}, and missing now" for export, engine in missing)


def _worse(row: ComparisonResult, before: ComparisonResult) -> list[str]:
    if row.status != "met" and before.status == "met":
        return [f"{row.export} in {row.engine}: was met, is {row.status}"]
    old = {check.name: check for gate in before.gates for check in gate.checks}
    pairs = [(check, old.get(check.name)) for gate in row.gates for check in gate.checks if check.name in COMPARED]
    return [
        f"{row.export} in {row.engine}: {check.name} {then.value:.4g} became {check.value:.4g}"
        for check, then in pairs
        if then is not None and _is_worse(check, then) and abs(check.value - then.value) > SMALLEST
    ]


def _is_worse(check: Metric, then: Metric) -> bool:
    """Whether the intervals do not meet, on the worse side."""
    if check.low is None or check.high is None or then.low is None or then.high is None:
        return False
    return check.high < then.low if higher_is_better(check.name) else check.low > then.high
