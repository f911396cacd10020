"""A trial in a child process: whatever ends it there is an outcome here."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypedDict

from lora2serve.errors import EngineError, SweepError
from lora2serve.sweeping.gpu_leases import leased_gpu
from lora2serve.sweeping.trial_record import RowLoss, TrialOutcome
from lora2serve.system import scratch
from lora2serve.system.worker_process import WorkerProcess

OUT_OF_MEMORY = "out of memory"  # how the training's own message begins
WORKER = "lora2serve.sweeping.trial_worker:TrialWorker"


class TrialOrder(TypedDict):
    """What a child is told of one trial; paths are absolute."""

    recipe: str
    overrides: list[str]
    run: str
    base: str
    base_loss: dict[str, object] | None  # an ``EvalLoss``; None where it is not the one of all trials
    quick: bool  # see ``finetune.train``
    final_rows: str | None  # to measure the saved adapter on, instead of those that the training watched


class TrialPlace(Protocol):
    """Where trials run: children of this process, or tasks of a cluster. Called from several threads."""

    def run(self, order: TrialOrder) -> TrialOutcome:
        """Train; whatever happens to the trial is its outcome."""
        ...

    def measure(self, recipe: Path, base: Path, files: Sequence[Path]) -> list[RowLoss]:
        """The base's losses on each file of rows; SweepError where it cannot be measured."""
        ...

    def stop(self) -> None:
        """End all that runs."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class TrialProcess(WorkerProcess):
    """Its errors are those of the training, without a name before them."""

    def failed(self, message: dict[str, str]) -> EngineError:  # type: ignore[override]
        """In the training's own words."""
        return EngineError(message["error"], message["hint"])


@dataclass
class ChildTrials:
    """Trials as children of this process, each with a GPU of its own where there are any.

    Without a GPU a child that is well is used again: its libraries take longer to load than a small model to train. On
    a GPU it ends with its trial, and with it whatever it left in the memory there.
    """

    gpus: tuple[str, ...] = ()
    threads: int = 0
    _running: list[TrialProcess] = field(default_factory=list)
    _idle: list[TrialProcess] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, order: TrialOrder) -> TrialOutcome:
        """See ``TrialPlace``."""
        run = Path(order["run"])
        shutil.rmtree(run, ignore_errors=True)  # of a worker that has ended
        with leased_gpu(self.gpus) as gpu, scratch.claimed(run) as keep:
            run.mkdir(parents=True)
            try:
                with self._process(gpu) as process:
                    outcome = TrialOutcome.from_json(process.call("train", order=order), run.name)
            except EngineError as error:
                return _failed(error)
            keep()
            return outcome

    def measure(self, recipe: Path, base: Path, files: Sequence[Path]) -> list[RowLoss]:
        """See ``TrialPlace``."""
        paths = [str(path) for path in files]
        try:
            with leased_gpu(self.gpus) as gpu, self._process(gpu) as process:
                answer = process.call("measure", recipe=str(recipe), base=str(base), files=paths)
        except EngineError as error:
            raise SweepError(f"the base cannot be measured: {error.message}", error.hint) from error
        return [RowLoss.from_json(item, "losses") for item in answer]

    def stop(self) -> None:
        """See ``TrialPlace``; each thread sees its child end, and reaps it."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """See ``TrialPlace``."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _process(self, gpu: str | None) -> Iterator[TrialProcess]:
        with self._lock:
            if self._stopped:
                raise EngineError("stopped")
            process = self._idle.pop() if self._idle else self._started(gpu)
            self._running.append(process)
        try:
            yield process
        except BaseException:
            process.close()
            raise
        else:
            if gpu is not None:
                process.close()
            else:
                self._idle.append(process)
        finally:
            with self._lock:
                self._running.remove(process)

    def _started(self, gpu: str | None) -> TrialProcess:
        options = {"gpu": gpu, "threads": self.threads}
        return TrialProcess("trial", WORKER, options, scratch.log_file("trial"))


def _failed(error: EngineError) -> TrialOutcome:
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    status = "out of memory" if error.message.startswith(OUT_OF_MEMORY) else "failed"
    return replace(TrialOutcome(problem=message), status=status)  # type: ignore[arg-type]
