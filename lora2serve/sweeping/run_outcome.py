"""What several fine-tunes at once say while they run, and what becomes of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from lora2serve.artifacts.run import Run
from lora2serve.progress import Advance, Progress, Silent, Unit


@dataclass(frozen=True)
class RunOutcome:
    """One of several fine-tunes: its run, or why there is none."""

    recipe: str
    state: Literal["finished", "failed"]
    run: str | None = None
    eval_loss: float | None = None  # None where no rows are held out
    seconds: float = 0.0
    problem: str = ""
    hint: str = ""


class NamedProgress(Silent):
    """Words of one of several trainings, with its name before them; no bars."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self.name = progress, name

    def note(self, text: str) -> None:
        """One line of information."""
        self._progress.note(f"{self.name}: {text}")

    def warn(self, text: str) -> None:
        """One line that the user should act on."""
        self._progress.warn(f"{self.name}: {text}")

    def show(self, words: Mapping[str, str]) -> None:
        """What a worker asks to be shown."""
        if "warning" in words:
            self.warn(words["warning"])
        else:
            self.note(words["note"])


class NamedBars(NamedProgress):
    """With bars, where all of them are shown by one process."""

    @contextmanager
    def track(self, label: str, total: int, unit: Unit = "") -> Iterator[Advance]:
        """A bar with its name."""
        with self._progress.track(f"{self.name}: {label}", total, unit) as advance:
            yield advance


def eval_loss(run: Run) -> float | None:
    """Of the tuned model; None where no rows are held out."""
    tuned = run.record.metrics.tuned
    return tuned.eval_loss if tuned else None
