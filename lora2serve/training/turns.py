"""Trainings of one process that take turns: each in a thread of its own, of which one works at a time.

Between two of its steps a training passes the turn on, with the random numbers as they are for it. Ctrl-C reaches the
main thread only: those in their steps stop after the one in hand, and save; the others are broken off.
"""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Self

from lora2serve.system import interruption

Job = Callable[["Turn"], object]


class Turns:
    """``run`` lets jobs take turns; ``told`` is what is said at the first Ctrl-C."""

    def __init__(self, told: Callable[[], object]) -> None:
        self._told = told
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []  # the first one works
        self.stopped = False  # each finishes its step, and saves
        self.broken = False  # each ends where it is
        self._stopped_at = 0.0

    def run(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """What each ended with, None where it is done. KeyboardInterrupt once all have ended, after a Ctrl-C."""
        turns = [Turn(self, job) for job in jobs]
        self._waiting = list(turns)
        with self._interruptible():
            for turn in turns:
                turn.thread.start()
            for turn in turns:
                turn.thread.join()
        if self.stopped:
            raise KeyboardInterrupt
        return [turn.ended_by for turn in turns]

    @contextmanager
    def work(self, turn: Turn) -> Iterator[None]:
        """From its first turn to its end, after which the others go on."""
        try:
            self.wait(turn)
            yield
        finally:
            with self._changed:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def rotate(self) -> None:
        """The next one works, and that which did comes last."""
        with self._changed:
            self._waiting = [*self._waiting[1:], self._waiting[0]]
            self._changed.notify_all()

    def wait(self, turn: Turn) -> None:
        """Until it is its turn; KeyboardInterrupt where it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] is turn)
        if self.broken or (self.stopped and not turn.in_steps):
            raise KeyboardInterrupt

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # where Python delivers no signal
            yield
            return
        import signal

        before = interruption.handle(self._interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C, or a scheduler's SIGTERM; a later one breaks off the steps, too."""
        if self.stopped and time.monotonic() - self._stopped_at <= interruption.PAIR:
            return
        if not self.stopped:
            self.stopped, self._stopped_at = True, time.monotonic()
            self._told()
        else:
            self.broken = True
        working = next(iter(self._waiting), None)
        if working and (self.broken or not working.in_steps):
            working.break_off()


class Turn:
    """One of them."""

    def __init__(self, turns: Turns, job: Job) -> None:
        self._turns, self._job = turns, job
        self.in_steps = False  # a checkpoint can be saved
        self.ended_by: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def stopped(self) -> bool:
        """Whether the step in hand is to be the last one."""
        return self._turns.stopped

    def pass_on(self) -> None:
        """Let each of the others do a step; KeyboardInterrupt where this one is to end instead."""
        numbers = RandomNumbers.now()
        self._turns.rotate()
        self._turns.wait(self)
        numbers.restore()

    @contextmanager
    def steps(self) -> Iterator[None]:
        """While it does its steps, the first Ctrl-C lets the one in hand be saved."""
        self.in_steps = True
        try:
            yield
        finally:
            self.in_steps = False

    def break_off(self) -> None:
        """Raise KeyboardInterrupt where its thread is, as Ctrl-C does in the main thread."""
        if self.thread.ident is not None:
            error = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread.ident), error)

    def _run(self) -> None:
        try:
            with self._turns.work(self):
                try:
                    self._job(self)
                except BaseException as error:
                    traceback.clear_frames(error.__traceback__)  # its model
                    self.ended_by = error
                gc.collect()
        except KeyboardInterrupt as error:  # before its first turn
            self.ended_by = error


@dataclass(frozen=True)
class RandomNumbers:
    """Where the generators of this process stand."""

    python: object
    numpy: object
    torch: object
    gpus: object

    @classmethod
    def now(cls) -> Self:
        """As they are."""
        import numpy
        import torch

        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        return cls(random.getstate(), numpy.random.get_state(), torch.get_rng_state(), gpus)

    def restore(self) -> None:
        """Let them go on from here."""
        import numpy
        import torch

        random.setstate(self.python)  # type: ignore[arg-type]
        numpy.random.set_state(self.numpy)  # type: ignore[arg-type]
        torch.set_rng_state(self.torch)  # type: ignore[arg-type]
        if self.gpus is not None:
            torch.cuda.set_rng_state_all(self.gpus)  # type: ignore[arg-type]
