"""The report's files: report.json, report.html, report.xml and summary.md, each whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lora2serve.errors import InputError
from lora2serve.parity import junit, page, summary
from lora2serve.parity.report import Report


def write(report: Report, directory: Path) -> Path:
    """Write them into ``directory``; the page's path."""
    contents = {
        "report.json": json.dumps(report.json(), indent=1, ensure_ascii=False) + "\n",
        "report.xml": junit.render(report),
        "summary.md": summary.render(report),
        "report.html": page.render(report),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            temporary = directory / f".{name}.new"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, directory / name)
    except OSError as error:
        raise InputError(
            f"{error.filename or directory}: {error.strerror}", "name another place with --report"
        ) from None
    return directory / "report.html"
