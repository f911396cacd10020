"""Other people's servers and libraries in environments of their own, whose versions are not ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest


def make_environment(folder: Path, *packages: str) -> None:
    """An environment with these packages; skipped where no registry of packages is reached."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no environment of {', '.join(packages)}: {done.stderr.strip().splitlines()[-1:]}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a server that was started in a session of its own, with its workers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
