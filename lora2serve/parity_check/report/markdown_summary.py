"""summary.md: for a pull request, a CI job's page or a model card."""

from __future__ import annotations

from lora2serve.artifacts.metric_table import OVERVIEW, head
from lora2serve.artifacts.parity_report import ComparisonResult, ParityReport, SettingDifference

MARKS = {"met": "✅", "missed": "❌", "failed": "❌", "missing": "⚠️"}


def render(report: ParityReport) -> str:
    """The file's text."""
    lines = [
        f"### Parity of {report.run}: {'met' if report.met else '**not met**'}",
        "",
        f"| export | engine | | {' | '.join(head(name).lower().replace('kl', 'KL') for name in OVERVIEW)} | against |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in report.rows),
        "",
        *(f"- {line}" for line in [*(_why(row) for row in report.rows if row.gate), *report.regressions]),
        *(f"- `{row.title}`: {setting} (allowed by `{setting.allowed}`)" for row, setting in _allowed(report)),
        _scored(report),
    ]
    return "\n".join(lines) + "\n"


def _allowed(report: ParityReport) -> list[tuple[ComparisonResult, SettingDifference]]:
    """What differs on purpose, once for each export."""
    rows = {row.export: row for row in reversed(report.rows)}
    return [(row, setting) for row in rows.values() for setting in row.settings if setting.allowed]


def _scored(report: ParityReport) -> str:
    if not report.data.sequences:
        return "The settings were compared: all that lies beside the weights. No engine was asked."
    return f"{report.data.positions} tokens scored in each engine, against the trained model."


def _line(row: ComparisonResult) -> str:
    cells = [check.shown() if (check := row.check(name)) else "-" for name in OVERVIEW]
    first = [row.export, row.engine or "-", f"{MARKS[row.status]} {row.status}"]
    return f"| {' | '.join([*first, *cells, row.reference])} |"


def _why(row: ComparisonResult) -> str:
    gate = row.gate
    assert gate is not None
    where = f"`{row.export}` in {row.engine}" if row.engine else f"`{row.export}`"
    return f"{where}, {gate.name}: {gate.cause or gate.status}. First: {gate.first}"
