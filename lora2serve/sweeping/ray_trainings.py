"""``train --on ray``: each recipe on a GPU of a Ray cluster, or on several as one group of processes.

On a node the training runs in a child process, as it does without Ray. All nodes see the folder that it is started in,
and the run directory is made there. Ray finds the places; what a group needs of them is had at once or not at all.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lora2serve.config import recipe as recipes
from lora2serve.errors import Lora2ServeError, TrainError
from lora2serve.progress import Progress, Silent
from lora2serve.sweeping.leased_workers import LeasedWorkers
from lora2serve.sweeping.ray_cluster import cause, connect
from lora2serve.sweeping.remote_inputs import fetch_inputs
from lora2serve.sweeping.run_outcome import NamedProgress, RunOutcome
from lora2serve.system.hardware import usable_gpus

if TYPE_CHECKING:
    from ray.actor import ActorHandle

WORKER = "lora2serve.sweeping.run_worker:RunWorker"
LOOK = 0.3  # seconds between two looks at what a training says


class TrainingOrder(TypedDict):
    """What a node is asked for."""

    recipe: str  # a path, or with ``resume`` a run directory
    overrides: list[str]
    gpu: str | None
    folder: str
    resume: bool


class NodeTraining:
    """One process of a training on a node, with the GPU or the core that Ray gave it."""

    def __init__(self) -> None:
        gpus = usable_gpus()
        self._workers = LeasedWorkers(WORKER, gpus, 0 if gpus else 1)
        self._said: list[Mapping[str, str]] = []

    def address(self) -> tuple[str, str]:
        """Of this node, and a port that is free there."""
        import ray

        ip = str(ray.util.get_node_ip_address())
        with socket.create_server((ip, 0)) as server:
            return ip, str(server.getsockname()[1])

    def train(self, order: TrainingOrder, environment: Mapping[str, str]) -> Mapping[str, object]:
        """``run``, ``eval_loss`` and ``seconds``, or ``problem`` and ``hint``."""
        if not Path(order["folder"]).is_dir():
            problem = f"{order['folder']} is not on the node {socket.gethostname()}"
            return {"problem": problem, "hint": "start it in a folder that all nodes share"}
        try:
            os.chdir(order["folder"])
            file = Path(order["recipe"]) / "recipe.yaml" if order["resume"] else Path(order["recipe"])
            fetch_inputs(recipes.load(file, order["overrides"]), Silent())
            with self._workers.lent() as process:
                result: Mapping[str, object] = process.call(
                    "train", answer=self._said.append, **order, environment=dict(environment)
                )
        except Lora2ServeError as error:
            return {"problem": error.message, "hint": error.hint}
        finally:
            self._workers.close()
        return result

    def said(self) -> list[Mapping[str, str]]:
        """What is new of its words."""
        words, self._said[:] = list(self._said), []
        return words

    def stop(self) -> None:
        """It finishes its step and saves."""
        self._workers.stop(signal.SIGTERM)


@dataclass
class RayTrainings:
    """Trainings on a cluster. ``gpus``: processes for each, one GPU each; a core each where the cluster has none."""

    gpus: int
    on_gpu: bool
    progress: Progress
    stopped: bool = False
    _nodes: list[ActorHandle] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, named_orders: Sequence[tuple[str, TrainingOrder]], keep: Callable[[int, RunOutcome], object]) -> None:
        """All of them, as many at a time as Ray has places for; KeyboardInterrupt once each has saved."""
        with ThreadPoolExecutor(len(named_orders)) as pool, self._ended_by_ctrl_c():
            futures = {
                pool.submit(self._train, name, order): number for number, (name, order) in enumerate(named_orders)
            }
            for future in as_completed(futures):
                keep(futures[future], future.result())

    def _train(self, name: str, order: TrainingOrder) -> RunOutcome:
        import ray

        begin, own = time.monotonic(), NamedProgress(self.progress, name)
        try:
            with self._group() as nodes:
                own.note(f"begins on Ray ({self.gpus} {'GPU' if self.on_gpu else 'core'}{'s' * (self.gpus > 1)})")
                results = self._results(nodes, order, own)
        except ray.exceptions.RayError as error:
            results = [{"problem": f"Ray: {cause(error)}", "hint": "see Ray's logs"}]
        seconds = time.monotonic() - begin
        problems = [result for result in results if "problem" in result]
        if problems:
            first = next((each for each in problems if "and says why" not in str(each["problem"])), problems[0])
            if not self.stopped:
                own.warn(f"failed: {first['problem']}")
            return RunOutcome(name, "failed", None, None, seconds, str(first["problem"]), str(first["hint"]))
        loss = results[0]["eval_loss"]
        return RunOutcome(name, "finished", str(results[0]["run"]), loss if isinstance(loss, float) else None, seconds)

    def _results(
        self, nodes: Sequence[ActorHandle], order: TrainingOrder, own: NamedProgress
    ) -> list[Mapping[str, object]]:
        """What each process ended with; the words of the first are shown."""
        import ray

        environments = self._environments(nodes)
        pending = [node.train.remote(order, each) for node, each in zip(nodes, environments, strict=True)]
        results, waiting = list(pending), list(pending)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK)
            for words in ray.get(nodes[0].said.remote()):
                own.show(words)
        return [ray.get(result) for result in results]

    def _environments(self, nodes: Sequence[ActorHandle]) -> list[dict[str, str]]:
        """As a launcher gives them; each process has one GPU, and knows of no other on its machine."""
        import ray

        if len(nodes) == 1:
            return [{}]
        address, port = ray.get(nodes[0].address.remote())
        shared = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(len(nodes))}
        return [{**shared, "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for rank in range(len(nodes))]

    @contextmanager
    def _group(self) -> Iterator[list[ActorHandle]]:
        """As many processes as a training has, once there is room for all of them."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = {"GPU": 1.0} if self.on_gpu else {"CPU": 1.0}
        group = placement_group([needs] * self.gpus, strategy="PACK")
        nodes: list[ActorHandle] = []
        try:
            while not group.wait(1):
                if self.stopped:
                    raise ray.exceptions.TaskCancelledError
            options = {"num_gpus": 1, "num_cpus": 0} if self.on_gpu else {"num_cpus": 1}
            for number in range(self.gpus):
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
                actor = ray.remote(NodeTraining).options(**options, scheduling_strategy=place, max_concurrency=4)
                nodes.append(actor.remote())
            with self._lock:
                self._nodes += nodes
            yield nodes
        finally:
            for node in nodes:
                ray.kill(node)
            with self._lock:
                self._nodes = [node for node in self._nodes if node not in nodes]
            remove_placement_group(group)

    @contextmanager
    def _ended_by_ctrl_c(self) -> Iterator[None]:
        """The first lets each finish its step and save; a second ends them at once."""
        import ray

        try:
            yield
        except KeyboardInterrupt:
            self.progress.note("each training finishes its step and saves; Ctrl-C again ends them at once")
            self.stopped = True
            with self._lock:
                stopping = [node.stop.remote() for node in self._nodes]
            try:
                with suppress(ray.exceptions.RayError):
                    ray.get(stopping)
                while self._nodes:
                    time.sleep(LOOK)
            except KeyboardInterrupt:
                with self._lock:
                    for node in self._nodes:
                        ray.kill(node)
            raise


def ray_trainings(address: str, gpus: int | None, progress: Progress) -> RayTrainings:
    """On the cluster at ``address`` ("ray", or "ray://HOST:PORT"); TrainError where it cannot hold such a training."""
    resources = connect(TrainError, None if address == "ray" else address)
    has_gpus = int(resources.get("GPU", 0))
    count, there = gpus or 1, has_gpus or int(resources.get("CPU", 0))
    if count > there:
        kind = "GPUs" if has_gpus else "cores"
        raise TrainError(f"--gpus {count}: the Ray cluster has {there} {kind}", f"at most --gpus {there}")
    return RayTrainings(count, has_gpus > 0, progress)
