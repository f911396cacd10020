"""The parity report of an export as others may read it: every figure with its interval and bound, none of the texts.

``report.json`` of a run holds held-out rows and answers to them, which need not be anybody else's to read. So what goes
up is made anew from the figures: ``parity/<export>.md`` to look at and ``parity/<export>.json`` for programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora2serve.artifacts.run import Run
from lora2serve.hub.card_markdown import figure, table, title
from lora2serve.hub.package import Item, public, text_item

FOLDER = "parity"
CHECK = ("name", "value", "low", "high", "bound", "met")
COUNTS = ("positions", "task", "general", "conversations", "prompts")


def page_of(name: str) -> str:
    """Where the report of the export ``name`` lies in a repository."""
    return f"{FOLDER}/{name}.md"


def items(name: str, path: Path, about: Mapping[str, Any], run: Run | None) -> list[Item]:
    """The report on the export ``name`` at ``path`` as two small files; none where the run has no report on it.

    A report on another state of the export (its figures are not those of the manifest) is no report on this one.
    """
    content = digest(_read(run), path.name, about)
    if not content["rows"]:
        return []
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return [text_item(page_of(name), page(name, content)), text_item(f"{FOLDER}/{name}.json", text)]


def digest(report: Mapping[str, Any], name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one export's rows; formats as in docs/parity.md, without prompts, texts and answers."""
    engines = (about.get("parity") or {}).get("engines") or {}
    rows = [row for row in report.get("rows") or [] if row.get("export") == name]
    same = [row for row in rows if _measured(row) == _told(engines.get(row.get("engine")))]
    return {
        "format": 1,
        "export": name,
        "data": {key: report["data"].get(key) for key in COUNTS if key in report["data"]} if same else {},
        "references": public(report.get("references") or {}),
        "versions": public(report.get("versions") or {}),
        "rows": [_row(row) for row in same],
    }


def page(name: str, content: Mapping[str, Any]) -> str:
    """The report in Markdown, as the Hub shows it."""
    data = content["data"]
    scored = (
        f"{data.get('positions', 0)} tokens were scored ({data.get('task', 0)} of held-out data, "
        f"{data.get('general', 0)} of general text) by the trained model and by this export in its own engine, from "
        f"the same token ids; {data.get('conversations', 0)} prompts were compared byte for byte and "
        f"{data.get('prompts', 0)} answered greedily. Intervals are 95 % (block bootstrap); the verdict is on their "
        "worse end."
    )
    parts = [f"# Parity of {name}", scored, *(_section(row) for row in content["rows"])]
    references = [f"{key}: {value.get('version')}" for key, value in content["references"].items()]
    made = ", ".join(f"{key} {value}" for key, value in content["versions"].items())
    parts.append(f"Compared with {'; '.join(references) or 'the trained model'}. Made with {made}.")
    return "\n\n".join(parts) + "\n"


def _section(row: Mapping[str, Any]) -> str:
    head = f"## In {row['engine']}: {row['status']}\n\n{row.get('version') or ''}; thresholds of {row.get('kind')}"
    parts = [f"{head}; the verdict is against the model {_against(row)}."]
    for gate in row["gates"]:
        if gate["checks"]:
            lines = [_check(check) for check in gate["checks"]]
            heads = ["figure", "value", "95 % interval", "bound", ""]
            parts.append(f"### {gate['name'].capitalize()}: {gate['status']}\n\n{table(heads, lines)}")
    return "\n\n".join(parts)


def _against(row: Mapping[str, Any]) -> str:
    words = {"trained": "as trained, on the quantised base", "original": "on the full-precision base"}
    return words.get(str(row.get("reference")), str(row.get("reference")))


def _check(check: Mapping[str, Any]) -> list[str]:
    name, bound = str(check["name"]), check.get("bound")
    ends = [figure(name, end) for end in (check.get("low"), check.get("high")) if end is not None]
    ends = ends[::-1] if name == "retention" else ends  # shown is what is kept, measured what is lost
    interval = " to ".join(ends) if len(set(ends)) == 2 else ""
    sign = "≥" if name in ("top1", "equal_answers", "retention") else "≤"
    verdict = {True: "met", False: "**missed**"}.get(check.get("met"), "")  # type: ignore[arg-type]
    return [title(name), figure(name, check["value"]), interval, f"{sign} {figure(name, bound)}" * (bound is not None),
            verdict]  # fmt: skip


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    gates = [
        {"name": gate["name"], "status": gate["status"], "checks": [_only(check, CHECK) for check in gate["checks"]]}
        for gate in row.get("gates") or []
    ]
    kept = _only(row, ("engine", "version", "kind", "reference", "status", "seconds"))
    beside = {name: [_only(check, CHECK) for check in checks] for name, checks in (row.get("beside") or {}).items()}
    return {**kept, "gates": gates, "beside": beside}


def _only(content: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: content[key] for key in keys if key in content}


def _measured(row: Mapping[str, Any]) -> Any:
    """What the report says of one engine, to be held against what the manifest says."""
    checks: Sequence[Mapping[str, Any]] = next(
        (gate["checks"] for gate in row.get("gates") or [] if gate.get("name") == "behaviour"), []
    )
    return row.get("status"), next((check["value"] for check in checks if check["name"] == "mean_kl"), None)


def _told(engine: Any) -> Any:
    return (engine.get("status"), engine.get("mean_kl")) if isinstance(engine, Mapping) else None


def _read(run: Run | None) -> dict[str, Any]:
    path = run.parity / "report.json" if run else None
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # half a file is no report
        return {}
    return content if isinstance(content, dict) else {}
