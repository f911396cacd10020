"""The report's files: report.json, report.html, report.xml and summary.md, each whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from lora2serve.artifacts.parity_report import ParityReport
from lora2serve.errors import InputError
from lora2serve.parity_check.report import html_page, junit, markdown_summary


def write(report: ParityReport, directory: Path) -> Path:
    """Write them into ``directory``; the page's path."""
    contents = {
        "report.json": report.to_text(indent=1),
        "report.xml": junit.render(report),
        "summary.md": markdown_summary.render(report),
        "report.html": html_page.render(report),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            temporary = directory / f".{name}.new"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, directory / name)
    except OSError as error:
        raise InputError(
            f"{error.filename or directory}: {error.strerror}", "choose another directory with --report"
        ) from None
    return directory / "report.html"
