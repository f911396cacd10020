"""``plan --exact``: the recipe's own way on fake tensors, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lora2serve.planning.activations import ActivationMemory
from lora2serve.planning.memory_plan import PlannedBytes, assembled
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import StaticMemory, optimizer_bytes
from lora2serve.system import scratch
from lora2serve.system.worker_process import WorkerProcess

WORKER = "lora2serve.training.exact_plan:ExactPlan"
SECONDS = 3600.0  # for one model: a large one on a busy machine takes minutes


@dataclass(frozen=True)
class ExactMemory:
    """What the real code would allocate."""

    bytes: PlannedBytes
    trainable: int
    parameters: int
    layers: int


class ExactPlanner:
    """Runs models on fake tensors, one after the other."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker

    def measure(self, path: Path, settings: PlanSettings, ratio: float) -> ExactMemory:
        """The memory of the model at ``path`` as it is trained with ``settings``; EngineError where it cannot be."""
        facts: dict[str, int] = self._worker.call("measure", path=str(path), settings=asdict(settings))
        full, count = settings.method == "full", facts["trainable"]
        size = settings.itemsize if full else settings.trained_bytes
        static = StaticMemory(
            weights=facts["weights"] - facts["quantization_state"],
            quantization_state=facts["quantization_state"],
            adapter=facts["adapter"],
            gradients=count * size,
            optimizer=optimizer_bytes(count, settings),
            trainable=count,
        )
        layers = facts["layers"]
        activations = ActivationMemory(facts["stored"] * layers, facts["layer"], facts["head"])
        parts = assembled(static, activations, settings, layers, ratio)
        return ExactMemory(parts, count, facts["parameters"], layers)


@contextmanager
def exact_planner() -> Iterator[ExactPlanner]:
    """A planner, whose process ends with the block."""
    with WorkerProcess("plan", WORKER, {}, scratch.log_file("plan"), SECONDS) as worker:
        yield ExactPlanner(worker)
