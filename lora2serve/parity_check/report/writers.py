"""The report's files: report.json, report.html, report.xml and summary.md, each whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from errno import EISDIR
from functools import partial
from pathlib import Path

from lora2serve.artifacts.parity_report import ParityReport
from lora2serve.errors import InputError
from lora2serve.parity_check.report import html_page, junit, markdown_summary
from lora2serve.system import scratch
from lora2serve.system.small_files import write_text

PAGE = "report.html"
RENDERERS: Mapping[str, Callable[[ParityReport], str]] = {
    "report.json": partial(ParityReport.to_text, indent=1),
    "report.xml": junit.render,
    "summary.md": markdown_summary.render,
    PAGE: html_page.render,
}


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """The folder of a report, while it is worked for; InputError where none could be written. Left empty, it goes."""
    with ExitStack() as stack:
        with _refused(directory):
            stack.enter_context(scratch.filled(directory))
            _refuse_folders(directory)
            with tempfile.TemporaryFile(dir=directory):
                pass
        yield


def refuse(directory: Path) -> None:
    """InputError where ``reserved`` would raise it; nothing is made."""
    with _refused(directory):
        scratch.try_folder(directory)
        _refuse_folders(directory)


def _refuse_folders(directory: Path) -> None:
    for name in RENDERERS:
        if (directory / name).is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(directory / name))


def write(report: ParityReport, directory: Path) -> Path:
    """Write them into ``directory``; the page's path."""
    contents = {name: render(report) for name, render in RENDERERS.items()}
    with _refused(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            write_text(directory / name, text)
    return directory / PAGE


@contextmanager
def _refused(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else directory
        raise InputError(f"{place}: {error.strerror}", "choose another directory with --report") from None
