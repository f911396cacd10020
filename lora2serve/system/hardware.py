"""What the machine has: NVIDIA GPUs, cores, memory, the cache folder. Asked in one place; imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS = 20  # a driver that hangs is no GPU


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    memory: str  # such as "81559 MiB"
    driver: str


@cache
def nvidia_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, whatever torch can use of them; empty where there is none or no driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    fields = [[field.strip() for field in line.rsplit(",", 2)] for line in lines if line.strip()]
    return tuple(Gpu(*values) for values in fields if len(values) == 3)


def usable_gpus() -> tuple[str, ...]:
    """Their numbers or names, those that this process may use; empty where there is none."""
    gpus = nvidia_gpus()
    if not gpus:
        return ()
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return tuple(str(number) for number in range(len(gpus)))
    return tuple(name.strip() for name in visible.split(",") if name.strip())


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere every core
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$XDG_CACHE_HOME/lora2serve``, or ``~/.cache/lora2serve``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora2serve"
