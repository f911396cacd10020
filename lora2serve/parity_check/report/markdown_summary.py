"""summary.md: for a pull request, a CI job's page or a model card."""

from __future__ import annotations

from lora2serve.artifacts.metric_table import OVERVIEW, head
from lora2serve.artifacts.parity_report import ComparisonResult, ParityReport, SettingDifference
from lora2serve.hub.card_markdown import cell, literal

MARKS = {"met": "✅", "missed": "❌", "failed": "❌", "missing": "⚠️"}


def render(report: ParityReport) -> str:
    """The file's text."""
    lines = [
        f"### Parity of {literal(report.run)}: {'met' if report.met else '**not met**'}",
        "",
        f"| export | engine | | {' | '.join(head(name).lower().replace('kl', 'KL') for name in OVERVIEW)} | against |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in report.rows),
        "",
        *(f"- {_why(row)}" for row in report.rows if row.gate),
        *(f"- {literal(line)}" for line in report.regressions),
        *(
            f"- {literal(row.title)}: {literal(setting)} (allowed by {literal(setting.allowed)})"
            for row, setting in _allowed(report)
        ),
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
    engine = f"{row.engine or '-'}{f' ({row.computed})' if row.computed else ''}"
    first = [cell(literal(row.export)), engine, f"{MARKS[row.status]} {row.status}"]
    return f"| {' | '.join([*first, *cells, row.reference])} |"


def _why(row: ComparisonResult) -> str:
    gate = row.gate
    assert gate is not None
    where = f"{literal(row.export)} in {row.engine}" if row.engine else literal(row.export)
    return f"{where}, {gate.name}: {literal(gate.cause or gate.status)}. First: {literal(gate.first)}"
