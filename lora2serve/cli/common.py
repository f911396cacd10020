"""What several commands share: from words on the command line to runs, directories and a progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.artifacts.lineage import BaseRecord
    from lora2serve.artifacts.run import Run
    from lora2serve.progress import Progress


def progress(ctx: click.Context) -> Progress:
    """The terminal, as loud as the options say."""
    from lora2serve.console import Terminal

    return Terminal(quiet=ctx.find_root().obj["quiet"])


def find_run(name: str | None) -> Run:
    """A run by path or by name under ``runs/``; without a name the one made last."""
    from lora2serve.artifacts import run as runs

    if name is None:
        return runs.latest()
    for path in (Path(name), runs.ROOT / name):
        if runs.is_run(path):
            return runs.Run(path)
    raise UsageError(f"{name}: no finished run", "name a directory that `lora2serve train` made")


def fetch(name: str, progress: Progress, *, pickle: bool = False) -> Path:
    """A local directory for a path or a Hub id; ``pickle`` brings pickled adapters too."""
    from lora2serve.hub import fetch as pull

    return pull(name, pickle=pickle, progress=progress).path


def base_of(base: BaseRecord, given: str | None, progress: Progress) -> tuple[Path, str]:
    """The base of a run: ``--base``, or where it was at training, or the Hub by its id and revision."""
    if given:
        return fetch(given, progress), given
    if base.local:
        return base.local, base.id
    return fetch(base.pinned, progress), base.id
