"""summary.md: for a pull request, a CI job's page or a model card."""

from __future__ import annotations

from lora2serve.parity_check.report.labels import figure
from lora2serve.parity_check.report.parity_report import ComparisonResult, ParityReport

MARKS = {"met": "✅", "missed": "❌", "failed": "❌", "missing": "⚠️"}


def render(report: ParityReport) -> str:
    """The file's text."""
    lines = [
        f"### Parity of {report.run}: {'met' if report.met else '**not met**'}",
        "",
        "| export | engine | | mean KL | same top token | same answers | signal kept | against |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in report.subjects),
        "",
        *(f"- {line}" for line in [*(_why(row) for row in report.subjects if row.gate), *report.regressions]),
        f"{report.data['positions']} tokens scored in each engine, against the trained model.",
    ]
    return "\n".join(lines) + "\n"


def _line(row: ComparisonResult) -> str:
    cells = [figure(name, row.check(name)) for name in ("mean_kl", "top1", "equal_answers", "retention")]
    return f"| {row.export} | {row.engine} | {MARKS[row.status]} {row.status} | {' | '.join(cells)} | {row.reference} |"


def _why(row: ComparisonResult) -> str:
    gate = row.gate
    assert gate is not None
    return f"`{row.export}` in {row.engine}, {gate.name}: {gate.cause or gate.status}. First: {gate.first}"
