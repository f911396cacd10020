"""The parity report of an export as others may read it: every figure with its interval and bound, none of the texts.

``report.json`` of a run holds held-out rows and answers to them, which need not be anybody else's to read. So what goes
up is made anew from the figures: ``parity/<export>.md`` to look at and ``parity/<export>.json`` for programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.metric_table import bound, figure, interval, label
from lora2serve.artifacts.parity_overview import MEANINGS, REFERENCES, columns, overview, unjudged
from lora2serve.artifacts.parity_report import ComparisonResult, Gate, Metric, ParityReport
from lora2serve.artifacts.recommendation import Recommendation
from lora2serve.artifacts.run import Run
from lora2serve.errors import InputError
from lora2serve.hub.card_markdown import literal, table
from lora2serve.hub.package import UploadItem, public, text_item

FOLDER = "parity"
COUNTS = ("positions", "task", "general", "conversations", "prompts")
ABOUT_ROW = ("engine", "version", "kind", "reference", "status", "seconds", "computed", "size", "base_size", "speed")


def page_of(name: str) -> str:
    """The path in a repository of the report on the export ``name``."""
    return f"{FOLDER}/{name}.md"


def items(export: Export, run: Run | None) -> list[UploadItem]:
    """The report on an export as two small files; none where the run has no report on it.

    A report on another state of the export (its figures are not those of the manifest) is no report on this one.
    """
    whole = _read(run)
    report = _limited_to(whole, export)
    if whole is None or not report.rows:
        return []
    best = [item for item in whole.recommendations if item.export == export.path.name]
    text = json.dumps(digest(report, export.name, best), indent=1, ensure_ascii=False) + "\n"
    page = text_item(page_of(export.name), markdown(report, export.name, best))
    return [page, text_item(f"{FOLDER}/{export.name}.json", text)]


def digest(report: ParityReport, name: str, best: Sequence[Recommendation] = ()) -> dict[str, object]:
    """The figures of one export's rows; formats as in docs/parity.md, without prompts, texts and answers.

    ``best``: where it was the export to ship.
    """
    return {
        "format": 1,
        "export": name,
        **({"recommended": {item.served_in: item.reason for item in best}} if best else {}),
        "data": _only(report.data.to_json(), COUNTS),
        "references": public({key: info.to_json() for key, info in report.references.items()}),
        "versions": public(report.versions),
        "rows": [_row(row) for row in report.rows],
    }


def markdown(report: ParityReport, name: str, best: Sequence[Recommendation] = ()) -> str:
    """The report in Markdown, as the Hub shows it: what its page begins with, and every figure."""
    data = report.data
    scored = (
        f"{data.positions} tokens were scored ({data.task} of held-out data, {data.general} of general text) by the "
        "trained model and by this export in its own engine, from the same token ids; "
        f"{data.conversations} prompts were compared byte for byte and {data.prompts} answered greedily. Intervals are "
        "95 % (block bootstrap); the verdict is on their worse end."
    )
    heads = columns(report)
    first = table([*heads.values()], [[literal(row.cells[key]) for key in heads] for row in overview(report)])
    meanings = "\n".join(f"- {heads[key]}: {meaning}" for key, meaning in MEANINGS.items() if key in heads)
    shipped = [f"To ship for {item.served_in}: {item.reason}." for item in best]
    parts = [f"# Parity of {name}", *shipped, first, meanings, scored, *(_section(row) for row in report.rows)]
    references = "; ".join(f"{key}: {public(info.version)}" for key, info in report.references.items())
    versions = ", ".join(f"{key} {public(version)}" for key, version in report.versions.items())
    parts.append(f"Compared with {references or 'the trained model'}. Made with {versions}.")
    return "\n\n".join(parts) + "\n"


def _limited_to(report: ParityReport | None, export: Export) -> ParityReport:
    """The report with the rows on this export as it is now, and without anything but figures."""
    if report is None:
        return ParityReport()
    rows = [row for row in report.rows if row.export == export.path.name and _is_on(row, export.manifest)]
    return replace(report, rows=tuple(rows))


def _is_on(row: ComparisonResult, manifest: Manifest) -> bool:
    """Whether the manifest says of that engine what the report says."""
    verdict = manifest.parity.engines.get(row.engine) if manifest.parity else None
    measured = row.check("mean_kl")
    return verdict is not None and (verdict.status, verdict.mean_kl) == (row.status, measured and measured.value)


def _section(row: ComparisonResult) -> str:
    parts = [
        f"## In {row.engine}: {row.status}\n\n{row.version}; thresholds of {row.kind}; "
        f"the verdict is against {REFERENCES[row.reference]}."
    ]
    for gate in row.gates:
        if gate.checks:
            heads = ["figure", "value", "95 % interval", "bound", ""]
            lines = table(heads, [_line(check) for check in gate.checks])
            parts.append(f"### {gate.name.capitalize()}: {gate.status}\n\n{lines}")
    if row.settings:
        parts.append(f"Settings that differ from the planned ones: {', '.join(map(literal, _settings(row)))}.")
    return "\n\n".join(parts)


def _line(check: Metric) -> Sequence[str]:
    name = check.name
    verdict = "" if check.met is None else "met" if check.met else "**missed**"
    ends = interval(name, check.low, check.high, 4)
    limit = bound(name, check.bound) or unjudged(check.unjudged)
    return [label(name), figure(name, check.value, 4), ends, limit, verdict]


def _settings(row: ComparisonResult) -> list[str]:
    """By name alone: a value may be a system prompt, or a path of this machine."""
    return [f"{setting.path} ({'allowed' if setting.allowed else 'missed'})" for setting in row.settings]


def _row(row: ComparisonResult) -> dict[str, object]:
    return {
        **_only(row.to_json(), ABOUT_ROW),
        "gates": [_gate(gate) for gate in row.gates],
        "beside": {name: [check.to_json() for check in checks] for name, checks in row.beside.items()},
        **({"settings": _settings(row)} if row.settings else {}),
    }


def _gate(gate: Gate) -> dict[str, object]:
    return {"name": gate.name, "status": gate.status, "checks": [check.to_json() for check in gate.checks]}


def _only(content: Mapping[str, object], keys: Iterable[str]) -> dict[str, object]:
    return {key: content[key] for key in keys if key in content}


def _read(run: Run | None) -> ParityReport | None:
    path = run.parity / "report.json" if run else None
    try:
        return ParityReport.read(path) if path and path.is_file() else None
    except InputError:  # half a file is no report
        return None
