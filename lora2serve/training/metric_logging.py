"""What the trainer reports: figures into metrics.jsonl, steps into the bar, checkpoints into notes."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from lora2serve.errors import TrainError
from lora2serve.progress import Advance, Progress
from lora2serve.system import interruption

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class MetricLog(TrainerCallback):  # type: ignore[misc]
    """Metrics into metrics.jsonl, steps into the bar, checkpoints into words, Ctrl-C into a checkpoint."""

    def __init__(self, path: Path, advance: Advance, progress: Progress) -> None:
        self.path, self.advance, self.progress = path, advance, progress
        self.pace: Callable[[], str] = str  # what stands behind the figures beside the bar
        self.last: dict[str, tuple[int, float]] = {}  # figure -> step, value
        self.stopped, self.stopped_at = False, 0.0
        self.all_stop: bool | None = None  # of several processes: whether one of them was stopped when they agreed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """After --resume the bar starts where the run is, and steps beyond the checkpoint leave the log."""
        self.advance(state.global_step)
        drop_later(self.path, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Move the bar; after Ctrl-C, save and stop."""
        self.advance(1)
        if self.stopped if self.all_stop is None else self.all_stop:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        """One line of metrics.jsonl; TrainError once the loss is no number, from which no step leads back."""
        loss = (logs or {}).get("loss")
        if isinstance(loss, float) and not math.isfinite(loss):
            raise TrainError(
                f"step {state.global_step}: the loss is {loss}, expected a finite number",
                "lower train.learning_rate, or raise train.warmup",
            )
        figures = {
            key: value for key, value in (logs or {}).items() if isinstance(value, int | float) and math.isfinite(value)
        }
        if {"loss", "eval_loss", "train_runtime"} & figures.keys():  # the last one once, at the end
            self.last |= {key: (state.global_step, value) for key, value in figures.items()}
            add_line(self.path, {"step": state.global_step, **figures})
            self.advance(0, ", ".join(filter(None, [self._figures(), self.pace()])))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """One line a checkpoint, so that a log file shows that something moves."""
        figures = self._figures(since=state.global_step - args.logging_steps + 1)
        self.progress.note(f"step {state.global_step} of {state.max_steps}: {figures or 'saved'}")

    def _figures(self, since: int = 0) -> str:
        """The last figures, those of a step before ``since`` left out."""
        labels = {
            "loss": "loss", "rewards/margins": "margin",
            "eval_loss": "eval loss", "eval_rewards/margins": "eval margin",
        }  # fmt: skip
        known = {key: self.last[key] for key in labels if key in self.last}
        return ", ".join(f"{labels[key]} {value:.4f}" for key, (step, value) in known.items() if step >= since)

    def stop(self) -> None:
        """The step in hand is the last one."""
        self.stopped = True

    @contextmanager
    def stop_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C (or a scheduler's SIGTERM) finishes the step and saves; a later one ends at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped and time.monotonic() - self.stopped_at > interruption.PAIR:
                restore()
                raise KeyboardInterrupt
            if not self.stopped:
                self.stopped, self.stopped_at = True, time.monotonic()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        if threading.current_thread() is not threading.main_thread():  # where Python delivers no signal
            yield
            return
        before = interruption.handle(stop)
        try:
            yield
        finally:
            restore()


def add_line(path: Path, content: Mapping[str, object]) -> None:
    """One JSON object behind those that a file has, one a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def drop_later(path: Path, step: int) -> None:
    """Take the lines of steps beyond ``step`` out of a file of these, if there is one."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        done = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in done), encoding="utf-8")
