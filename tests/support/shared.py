"""What is made once for all workers of pytest-xdist: the first one that needs it makes it, the others wait for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora2serve.system import file_lock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name``, in which ``make`` has been called; nobody writes into it afterwards."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # above the workers' own folders
    folder, ready = base / f"shared-{name}", base / f"shared-{name}.ready"
    with file_lock.locked(base / f"shared-{name}.lock", wait=True):
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)  # it failed in another worker
            folder.mkdir()
            make(folder)
            ready.touch()
    return folder
