"""Run a command as a whole process and say what it cost."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Cost:
    """One process, from start to exit."""

    wall: float  # seconds
    cpu: float  # seconds, user and system, all threads
    peak: int  # bytes resident at most: VmHWM


def cost(command: Sequence[str], env: Mapping[str, str] | None = None) -> Cost:
    """Run ``command`` to its end; an error if it fails.

    The peak is the kernel's own high-water mark. A child begins with its parent's mark, so the caller
    itself must stay small: it must not have imported torch.
    """
    assert "torch" not in sys.modules, "a child inherits the peak of its parent"
    started = time.perf_counter()
    given = {**os.environ, **(env or {})}
    given.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once, not in each process
    process = subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def median(runs: Sequence[Cost]) -> Cost:
    """The median of each figure by itself."""
    return Cost(
        statistics.median(run.wall for run in runs),
        statistics.median(run.cpu for run in runs),
        int(statistics.median(run.peak for run in runs)),
    )


def repeat(command: Sequence[str], times: int, before: Callable[[], None]) -> Cost:
    """The median of several runs. ``before`` each, and after the disk has come to rest.

    One more comes first and is not counted: a virtual machine is handed memory at its first touch, and pays for it.
    """
    runs = []
    for _ in range(times + 1):
        before()
        os.sync()
        runs.append(cost(command))
    return median(runs[1:])


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
