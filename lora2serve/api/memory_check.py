"""Whether a training fits, asked before its base is downloaded."""

from __future__ import annotations

from dataclasses import replace

from lora2serve.api.plan_training import shape_at
from lora2serve.api.train_run import fetch_base
from lora2serve.config.recipe import Recipe
from lora2serve.errors import HubError, InputError, TrainError, UsageError
from lora2serve.planning.gpus import GpuModel, find_gpu
from lora2serve.planning.measured_memory import measured_ratio
from lora2serve.planning.memory_plan import (
    PlannedBytes,
    first_that_fits,
    fits,
    fitting_gpus,
    levers,
    planned_bytes,
)
from lora2serve.planning.model_shape import ModelShape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.step_choice import choose_parallel
from lora2serve.progress import Progress


def refuse_too_large(recipe: Recipe, gpu: str | None, progress: Progress) -> None:
    """TrainError where the recipe's training does not fit into ``gpu``, or the one that it would run on.

    Without a GPU it is the main memory. What no plan can be made of passes, after a note: a model, or modules to adapt
    (embeddings) that the closed form does not know.
    """
    from lora2serve.training import ranks
    from lora2serve.training.method_outlook import plan_settings
    from lora2serve.training.model import device, device_model

    target = find_gpu(gpu) if gpu else device_model(device())
    ratio, _ = measured_ratio(target.name)
    try:
        path = fetch_base(recipe.model, progress, weights=False)
        shape = shape_at(path, progress)
        asked = plan_settings(recipe.train, recipe.data.max_length, path, target.dtype)
        settings = choose_parallel(shape, asked, recipe.train, target, ranks.processes(), ratio).settings
        planned = planned_bytes(shape, settings, ratio)
    except (HubError, InputError, UsageError) as error:
        progress.note(f"memory not planned: {error.message.splitlines()[0]}")
        return
    if not fits(planned.total, target):
        raise _too_large(recipe, shape, settings, planned, target, ratio)


def _too_large(
    recipe: Recipe, shape: ModelShape, settings: PlanSettings, planned: PlannedBytes, target: GpuModel, ratio: float
) -> TrainError:  # fmt: skip
    change = first_that_fits(levers(shape, settings, ratio), target)
    if change:
        hint = f"the first change that fits: {change.change} ({change.total / 1e9:.1f} GB; {change.price})"
    else:
        least = planned_bytes(shape, replace(settings, batch=1, checkpointing=True), ratio).total
        larger = next(iter(fitting_gpus(least)), None)
        rows = f"with one row and checkpointing it takes {least / 1e9:.1f} GB"
        hint = f"no single change fits; {rows}" + (f", which a {larger} holds" if larger else ", more than one GPU has")
    message = (
        f"{recipe.model.path}: this training takes {planned.total / 1e9:.1f} GB, and {target.name} has "
        f"{target.memory / 1e9:.1f} GB (`lora2serve plan` shows the parts)"
    )
    return TrainError(message, hint)
