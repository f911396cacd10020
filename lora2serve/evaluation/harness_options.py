"""What is asked of lm-evaluation-harness."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.errors import UsageError

LONGEST_NAME = 80  # characters


@dataclass(frozen=True)
class HarnessOptions(JsonRecord):
    """Which tasks, how many examples before each question, and whether the chat template is used."""

    WHOLE: ClassVar[bool] = True

    tasks: tuple[str, ...]
    include: str = ""  # a folder of more tasks, in YAML
    shots: int | None = None
    chat: bool = False
    limit: int | None = None  # the first rows of each task

    @property
    def name(self) -> str:
        """Of the tasks as one suite."""
        return plain_name("-".join(self.tasks))[:LONGEST_NAME]


def plain_name(name: str) -> str:
    """A name as records have them: ``pass_1`` for ``pass@1``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).lstrip("_-") or "task"


def harness_options(
    tasks: tuple[str, ...], folder: object, shots: int | None, chat: bool, limit: int | None, suite: object
) -> HarnessOptions | None:
    """What is asked of the harness, if anything; ``folder`` and ``suite`` as they were named, or None.

    UsageError for what is for tasks only, and for tasks beside a suite.
    """
    given = {"--task-folder": folder is not None, "--shots": shots is not None, "--chat": chat}
    if not tasks and any(given.values()):
        raise UsageError(f"{next(name for name, present in given.items() if present)}: for --task")
    if tasks and suite is not None:
        raise UsageError(f"--task {tasks[0]} with --suite {suite}: expected one of the two")
    if tasks and limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: expected 1 at least")
    return HarnessOptions(tasks, "" if folder is None else str(folder), shots, chat, limit) if tasks else None
