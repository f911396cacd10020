"""A trial in a child process: whatever ends it there is an outcome here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypedDict

from lora2serve.errors import EngineError, SweepError
from lora2serve.sweeping.leased_workers import LeasedWorkers
from lora2serve.sweeping.sweep_suite import SuiteOrder
from lora2serve.sweeping.trial_record import RowLoss, TrialOutcome
from lora2serve.system import scratch

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
    suite: SuiteOrder | None  # to be answered, and to be judged by


class TrialPlace(Protocol):
    """Where trials run: children of this process, or tasks of a cluster. Called from several threads."""

    def run(self, order: TrialOrder) -> TrialOutcome:
        """Train; whatever happens to the trial is its outcome."""
        ...

    def measure(
        self, recipe: Path, base: Path, files: Sequence[Path], suites: Sequence[SuiteOrder] = ()
    ) -> list[RowLoss]:
        """The base's losses on each file of rows, then on each suite; SweepError where it cannot be measured."""
        ...

    def stop(self) -> None:
        """End all that runs."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class ChildTrials:
    """Trials as children of this process, each with a GPU of its own where there are any."""

    def __init__(self, gpus: tuple[str, ...] = (), threads: int = 0) -> None:
        self.workers = LeasedWorkers(WORKER, gpus, threads)

    def run(self, order: TrialOrder) -> TrialOutcome:
        """See ``TrialPlace``."""
        run = Path(order["run"])
        shutil.rmtree(run, ignore_errors=True)  # of a worker that has ended
        with scratch.claimed(run) as keep:
            run.mkdir(parents=True)
            try:
                with self.workers.lent() as process:
                    outcome = TrialOutcome.from_json(process.call("train", order=order), run.name)
            except EngineError as error:
                return _failed(error)
            keep()
            return outcome

    def measure(
        self, recipe: Path, base: Path, files: Sequence[Path], suites: Sequence[SuiteOrder] = ()
    ) -> list[RowLoss]:
        """See ``TrialPlace``."""
        paths = [str(path) for path in files]
        try:
            with self.workers.lent() as process:
                answer = process.call("measure", recipe=str(recipe), base=str(base), files=paths, suites=suites)
        except EngineError as error:
            raise SweepError(f"the base cannot be measured: {error.message}", error.hint) from error
        return [RowLoss.from_json(item, "losses") for item in answer]

    def stop(self) -> None:
        """See ``TrialPlace``."""
        self.workers.stop()

    def close(self) -> None:
        """See ``TrialPlace``."""
        self.workers.close()


def _failed(error: EngineError) -> TrialOutcome:
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    status = "out of memory" if error.message.startswith(OUT_OF_MEMORY) else "failed"
    return replace(TrialOutcome(problem=message), status=status)  # type: ignore[arg-type]
