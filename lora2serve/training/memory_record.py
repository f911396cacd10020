"""How much memory a run was planned to take on a GPU, and took: kept with it, and counted in the next plan."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import LoopRecord, MemoryRecord
from lora2serve.config.recipe import Recipe
from lora2serve.errors import InputError, UsageError
from lora2serve.planning.measured_memory import record_measured
from lora2serve.planning.memory_plan import WORKSPACE, planned_bytes
from lora2serve.planning.model_shape import model_shape
from lora2serve.progress import Progress
from lora2serve.training import ranks
from lora2serve.training.loop_choice import planned_settings
from lora2serve.training.model import Device
from lora2serve.weights.checkpoint import Checkpoint


def begin_measuring(device: Device) -> None:
    """Let the peak of torch's allocator begin now."""
    import torch

    if device.on_gpu:
        torch.cuda.reset_peak_memory_stats()


def keep_measured(run: Run, recipe: Recipe, base: Path, device: Device, progress: Progress) -> None:
    """The peak since then beside the plan into run.json, and into the figures of this machine; nothing on a CPU."""
    import torch

    if not device.on_gpu:
        return
    measured, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).name
    planned, loop = None, run.record.loop
    if loop is None:  # killed after the last step, and resumed: nothing was trained since
        return
    with suppress(InputError, UsageError):  # no plan can be made of this model, or of the modules that it adapts
        planned = planned_allocation(recipe, loop, base, device)
        if ranks.rank() == 0 and (reason := record_measured(name, planned, measured)):
            progress.note(reason)  # the trained adapter is not saved yet: nothing here may end the run
    run.save(replace(run.record, memory=MemoryRecord(device=name, planned_bytes=planned, peak_bytes=measured)))
    beside = f", planned {planned / 1e9:.2f} GB" if planned else ""
    progress.note(f"peak memory {measured / 1e9:.2f} GB{beside}")


def planned_allocation(recipe: Recipe, loop: LoopRecord, base: Path, device: Device) -> int:
    """Bytes of torch's allocator, by the closed form; CheckpointError or UsageError for what it does not know."""
    checkpoint = Checkpoint(base)
    settings = planned_settings(recipe, loop, base, device)
    planned = planned_bytes(model_shape(checkpoint.config, checkpoint.specs()), settings)
    return planned.tensors + (WORKSPACE if device.on_gpu else 0)
