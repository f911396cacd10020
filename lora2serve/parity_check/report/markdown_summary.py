"""summary.md: for a pull request, a CI job's page or a model card."""

from __future__ import annotations

from lora2serve.artifacts.metric_table import OVERVIEW, head
from lora2serve.artifacts.parity_report import ComparisonResult, ParityReport

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
        f"{report.data.positions} tokens scored in each engine, against the trained model.",
    ]
    return "\n".join(lines) + "\n"


def _line(row: ComparisonResult) -> str:
    cells = [check.shown() if (check := row.check(name)) else "-" for name in OVERVIEW]
    return f"| {row.export} | {row.engine} | {MARKS[row.status]} {row.status} | {' | '.join(cells)} | {row.reference} |"


def _why(row: ComparisonResult) -> str:
    gate = row.gate
    assert gate is not None
    return f"`{row.export}` in {row.engine}, {gate.name}: {gate.cause or gate.status}. First: {gate.first}"
