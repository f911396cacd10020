"""Trials on a Ray cluster: one worker of ours on each share of a node, which trains in child processes there."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.errors import SweepError
from lora2serve.sweeping.ray_cluster import cause, connect
from lora2serve.sweeping.sweep_suite import SuiteOrder
from lora2serve.sweeping.trial_process import ChildTrials, TrialOrder
from lora2serve.sweeping.trial_record import RowLoss, TrialOutcome
from lora2serve.system.hardware import usable_gpus

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class NodeTrials:
    """What runs on a node, with one of its GPUs or cores: the same children as without Ray."""

    def __init__(self) -> None:
        gpus = usable_gpus()
        self._trials = ChildTrials(gpus, 0 if gpus else 1)

    def train(self, order: TrialOrder) -> dict[str, object]:
        """One trial; its outcome."""
        _need(Path(order["recipe"]))
        return self._trials.run(order).to_json()

    def measure(
        self, recipe: str, base: str, files: Sequence[str], suites: Sequence[SuiteOrder]
    ) -> list[dict[str, object]]:
        """The base's losses on each file of rows, then on each suite."""
        _need(Path(recipe))
        losses = self._trials.measure(Path(recipe), Path(base), [Path(file) for file in files], suites)
        return [item.to_json() for item in losses]


@dataclass
class RayTrials:
    """Trials on such workers, as many as run at a time. All nodes see the sweep's folder."""

    on_gpu: bool
    _idle: list[ActorHandle] = field(default_factory=list)
    _busy: list[ActorHandle] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, order: TrialOrder) -> TrialOutcome:
        """See ``TrialPlace``."""
        import ray

        try:
            answer = self._call("train", order)
        except ray.exceptions.RayError as error:
            return TrialOutcome("failed", f"Ray: {cause(error)}")
        return TrialOutcome.from_json(answer, Path(order["run"]).name)

    def measure(
        self, recipe: Path, base: Path, files: Sequence[Path], suites: Sequence[SuiteOrder] = ()
    ) -> list[RowLoss]:
        """See ``TrialPlace``."""
        import ray

        try:
            answer = self._call("measure", str(recipe), str(base), [str(path) for path in files], list(suites))
        except ray.exceptions.RayError as error:
            raise SweepError(f"the base cannot be measured: {cause(error)}", "see Ray's logs") from error
        assert isinstance(answer, list)
        return [RowLoss.from_json(item, "losses") for item in answer]

    def stop(self) -> None:
        """See ``TrialPlace``; a child ends with its worker."""
        import ray

        with self._lock:
            for worker in self._busy:
                ray.kill(worker)

    def close(self) -> None:
        """See ``TrialPlace``."""
        import ray

        while self._idle:
            ray.kill(self._idle.pop())

    def _call(self, job: str, *arguments: object) -> object:
        """A job on a worker that is free, or on a new one; one that fails is not used again."""
        import ray

        needs = {"num_gpus": 1} if self.on_gpu else {"num_cpus": 1}
        with self._lock:
            worker = self._idle.pop() if self._idle else ray.remote(NodeTrials).options(**needs).remote()
            self._busy.append(worker)
        try:
            answer: object = ray.get(getattr(worker, job).remote(*arguments))
            self._idle.append(worker)
        finally:
            with self._lock:
                self._busy.remove(worker)
        return answer


def ray_trials(jobs: int | None) -> tuple[RayTrials, int]:
    """The cluster at RAY_ADDRESS, or the one that runs here, and how many trials it takes at a time.

    SweepError where there is none.
    """
    resources = connect(SweepError)
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    return RayTrials(gpus > 0), jobs or gpus or max(1, cpus)


def _need(recipe: Path) -> None:
    if not recipe.is_file():
        raise FileNotFoundError(f"{recipe} is not on this node: begin the sweep in a folder that all nodes share")
