"""A copy of the demo's run that may be written into, with exports of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora2serve.artifacts.run import Run
from tests.conftest import lora2serve
from tests.support.shared import once


@pytest.fixture(scope="session")
def evaluated_demo(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/demo``, which was evaluated beside its base on 40 of its held-out rows."""

    def make(folder: Path) -> None:
        copy_of(demo_run, folder)
        words = ("evaluate", "--against", "base", "--limit", 40, "--gate", "acc >= 0.5", "--gate", "acc >= base - 0.01")
        (folder / "printed.json").write_text(lora2serve(*map(str, words), "--json", cwd=folder))

    return once(tmp_path_factory, "evaluated", make)


def copy_of(run: Run, folder: Path) -> Path:
    """``runs/demo`` in a folder, to which ``runs/latest`` points."""
    copy = folder / "runs" / "demo"
    shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns("checkpoints", "exports", "parity", "evals"))
    (folder / "runs" / "latest").symlink_to("demo")
    return copy
