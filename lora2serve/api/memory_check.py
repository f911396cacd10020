"""Whether a training fits, asked before its base is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
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
    target = _target(gpu)
    ratio, _ = measured_ratio(target.name)
    try:
        shape, settings = _planned(recipe, target, ratio, progress)
        planned = planned_bytes(shape, settings, ratio)
    except (HubError, InputError, UsageError) as error:
        progress.note(f"memory not planned: {error.message.splitlines()[0]}")
        return
    if not fits(planned.total, target):
        raise _too_large(recipe, shape, settings, planned, target, ratio)


def refuse_too_large_together(recipes: Sequence[Recipe], gpu: str | None, progress: Progress) -> None:
    """TrainError where trainings that share their base do not fit at the same time.

    Each keeps its adapter and the state of its optimizer; a step is done by one of them at a time.
    """
    target = _target(gpu)
    ratio, _ = measured_ratio(target.name)
    try:
        plans = [planned_bytes(*_planned(recipe, target, ratio, progress), ratio) for recipe in recipes]
    except (HubError, InputError, UsageError):
        return  # which each of them says by itself
    states = [plan.adapter + plan.optimizer for plan in plans]
    total = max(plan.total - state for plan, state in zip(plans, states, strict=True)) + sum(states)
    if not fits(total, target):
        raise TrainError(
            f"{len(plans)} trainings on one base take {total / 1e9:.1f} GB, {sum(states) / 1e9:.1f} GB of it adapters "
            f"and their optimizers, and {target.name} has {target.memory / 1e9:.1f} GB",
            "name fewer of them, or lower train.lora.rank; without --share-base they come one after the other",
        )


def _target(gpu: str | None) -> GpuModel:
    from lora2serve.training.model import device, device_model

    return find_gpu(gpu) if gpu else device_model(device())


def _planned(recipe: Recipe, target: GpuModel, ratio: float, progress: Progress) -> tuple[ModelShape, PlanSettings]:
    """Of its base, and of its steps there; HubError, InputError or UsageError where nobody can say."""
    from lora2serve.training import ranks
    from lora2serve.training.method_outlook import plan_settings

    path = fetch_base(recipe.model, progress, weights=False)
    shape = shape_at(path, progress)
    asked = plan_settings(recipe.train, recipe.data, path, target.dtype)
    return shape, choose_parallel(shape, asked, recipe.train, target, ranks.processes(), ratio).settings


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
