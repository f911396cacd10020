"""summary.md: for a pull request, a CI job's page or a model card."""

from __future__ import annotations

from collections.abc import Iterator

from lora2serve.artifacts.parity_overview import MEANINGS, OverviewRow, columns, overview
from lora2serve.artifacts.parity_report import ComparisonResult, ParityReport, SettingDifference
from lora2serve.console import size
from lora2serve.hub.card_markdown import literal, table

MARKS = {"met": "✅", "missed": "❌", "failed": "❌", "missing": "⚠️"}


def render(report: ParityReport) -> str:
    """The file's text."""
    heads = columns(report)
    lines = [
        f"### Parity of {literal(report.run)}: {'met' if report.met else '**not met**'}",
        "",
        *_ship(report),
        table([*heads.values()], [_line(row, [*heads]) for row in overview(report)]),
        "",
        *(f"- {_why(row)}" for row in report.rows if row.gate),
        *(f"- {literal(line)}" for line in report.regressions),
        *(
            f"- {literal(row.title)}: {literal(setting)} (allowed by {literal(setting.allowed)})"
            for row, setting in _allowed(report)
        ),
        "",
        _scored(report),
        "",
        *(f"- {heads[name]}: {meaning}" for name, meaning in MEANINGS.items() if name in heads),
    ]
    return "\n".join(lines) + "\n"


def _ship(report: ParityReport) -> Iterator[str]:
    """What to ship, or why nothing."""
    for item in report.recommendations:
        name = f": **{literal(item.export)}** ({size(item.size)})" if item.export else ""
        yield f"- {item.title}{name}. {' '.join(map(literal, item.sentences))}"
    if report.recommendations:
        yield ""


def _allowed(report: ParityReport) -> list[tuple[ComparisonResult, SettingDifference]]:
    """What differs on purpose, once for each export."""
    rows = {row.export: row for row in reversed(report.rows)}
    return [(row, setting) for row in rows.values() for setting in row.settings if setting.allowed]


def _scored(report: ParityReport) -> str:
    if not report.data.sequences:
        return "The settings were compared: all that lies beside the weights. No engine was asked."
    return (
        f"{report.data.positions} tokens scored in each engine, against the trained model; in parentheses the bound of "
        "the format, for the worse end of the 95 % interval."
    )


def _line(row: OverviewRow, keys: list[str]) -> list[str]:
    cells = {key: literal(cell) if key == "export" else str(cell) for key, cell in row.cells.items()}
    cells["status"] = f"{MARKS[row.result.status]} {row.result.status}"
    return [cells[key] for key in keys]


def _why(row: ComparisonResult) -> str:
    gate = row.gate
    assert gate is not None
    where = f"{literal(row.export)} in {row.engine}" if row.engine else literal(row.export)
    return f"{where}, {gate.name}: {literal(gate.cause or gate.status)}. First: {literal(gate.first)}"
