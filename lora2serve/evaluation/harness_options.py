"""What is asked of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HarnessOptions:
    """Which tasks, how many examples before each question, and whether the chat template is used."""

    tasks: tuple[str, ...]
    include: Path | None = None  # a folder of more tasks, in YAML
    shots: int | None = None
    chat: bool = False
    limit: int | None = None
