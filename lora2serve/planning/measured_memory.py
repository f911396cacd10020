"""What trainings on this machine took beside what was planned for them: a ratio for each kind of GPU."""

from __future__ import annotations

import json
from pathlib import Path

from lora2serve.system.hardware import cache_folder

LAST = 5  # runs that count
LARGEST = 1.5  # a ratio beyond it is another program's memory, or a damaged file


def measured_file() -> Path:
    """Where the runs are on record, a line each."""
    return cache_folder() / "measured_memory.jsonl"


def record_measured(gpu: str, planned: int, measured: int) -> str:
    """Keep what a run took, in bytes of torch's allocator. The reason where it cannot be, else nothing."""
    path = measured_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"gpu": gpu, "planned": planned, "measured": measured}) + "\n")
    except OSError as error:
        return f"{path}: {error.strerror}, so the next plan does not count what this run took"
    return ""


def measured_ratio(gpu: str) -> tuple[float, int]:
    """The largest ratio of measured to planned bytes among the last runs on that GPU, at least 1, and how many."""
    path = measured_file()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    ratios = [ratio for line in lines if (ratio := _ratio(line, gpu)) is not None][-LAST:]
    return max([1.0, *ratios]), len(ratios)


def _ratio(line: str, gpu: str) -> float | None:
    """Of one run; None for one on another GPU, and for what is no such line."""
    try:
        content = json.loads(line)
        if content["gpu"] != gpu:
            return None
        ratio = float(content["measured"]) / float(content["planned"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    return ratio if 0 < ratio <= LARGEST else None
