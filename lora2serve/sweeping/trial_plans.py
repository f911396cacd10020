"""The memory that each trial will take, by the plan, and whether that fits: one that does not is never started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora2serve.api.plan_training import shape_at
from lora2serve.api.train_run import fetch_base
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import PRESETS, Recipe
from lora2serve.errors import HubError, InputError, UsageError
from lora2serve.planning.gpus import GpuModel, find_gpu, gpu_of_driver
from lora2serve.planning.measured_memory import measured_ratio
from lora2serve.planning.memory_plan import fits, planned_bytes
from lora2serve.planning.model_shape import ModelShape
from lora2serve.planning.plan_settings import settings_of
from lora2serve.planning.static_memory import target_layers, trainable
from lora2serve.planning.step_choice import choose_step
from lora2serve.progress import Progress
from lora2serve.sweeping.search_space import SearchSpace
from lora2serve.system.hardware import memory_bytes, nvidia_gpus


@dataclass(frozen=True)
class TrialMemory:
    """Bytes on the device, and values that are learned; ``misfit`` says why it cannot run, or is empty."""

    memory: int = 0
    parameters: int = 0
    misfit: str = ""


@dataclass(frozen=True)
class TrialPlanner:
    """``shape`` is None for a model that no plan can be made of: its trials are tried."""

    shape: ModelShape | None
    target: GpuModel
    ratio: float

    def plan(self, recipe: Path, overrides: list[str]) -> TrialMemory:
        """Of one trial, in pieces as large as training takes them there."""
        if self.shape is None:
            return TrialMemory()
        loaded = recipes.load(recipe, overrides)
        asked = settings_of(loaded.train, loaded.data.max_length, self.target.dtype, len(loaded.data.new_tokens))
        try:
            settings = choose_step(self.shape, asked, loaded.train, self.target, self.ratio).settings
            total = planned_bytes(self.shape, settings, self.ratio).total
            count = trainable(self.shape, settings)
        except UsageError as error:
            return TrialMemory(misfit=error.message)
        misfit = ""
        if not fits(total, self.target):
            misfit = (
                f"takes {total / 1e9:.1f} GB by its plan, and {self.target.name} has {self.target.memory / 1e9:.1f} GB"
            )
        return TrialMemory(total, count, misfit)


def trial_planner(recipe: Recipe, gpu: str, jobs: int, progress: Progress) -> TrialPlanner:
    """For ``gpu``, or the one that trials run on; without one, for the share of the main memory that each job has."""
    driver = next(iter(nvidia_gpus()), None)
    if gpu:
        target = find_gpu(gpu)
    elif driver:
        target = gpu_of_driver(driver.name, driver.memory)
    else:
        target = GpuModel(
            "the main memory" if jobs == 1 else f"1/{jobs} of the main memory", memory_bytes() // jobs, "float32"
        )
    try:
        shape = shape_at(fetch_base(recipe.model, progress, weights=False), progress)
    except (HubError, InputError) as error:
        progress.note(f"memory not planned: {error.message.splitlines()[0]}")
        shape = None
    return TrialPlanner(shape, target, measured_ratio(target.name)[0])


def usable_targets(space: SearchSpace, shape: ModelShape | None, progress: Progress) -> tuple[str, ...]:
    """Those of the space that this model has; of presets that mean the same layers, the first."""
    if shape is None:
        return space.targets
    chosen: dict[tuple[str, ...], str] = {}
    for targets in space.targets:
        names = targets.split("+")
        try:
            layers = tuple(linear.path for linear in target_layers(shape, names if len(names) > 1 else targets))
        except UsageError as error:
            if targets not in PRESETS:
                raise
            progress.note(f"{targets} is left out: {error.message}")
            continue
        if layers in chosen:
            progress.note(f"{targets} is left out: the same layers as {chosen[layers]} in this model")
        chosen.setdefault(layers, targets)
    return tuple(chosen.values())
