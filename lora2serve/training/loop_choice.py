"""How a run does its steps: chosen when it begins, kept in run.json, and the same after --resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import LoopRecord
from lora2serve.config.objectives import SFT
from lora2serve.config.recipe import Recipe, TrainRecipe
from lora2serve.config.train_methods import PROMPTS, STATES
from lora2serve.data.samples import Sample
from lora2serve.errors import InputError, TrainError, UsageError
from lora2serve.planning.gpus import GpuModel
from lora2serve.planning.measured_memory import measured_ratio
from lora2serve.planning.model_shape import model_shape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.step_choice import StepChoice, choose_parallel, recipe_step, share_of
from lora2serve.progress import Progress
from lora2serve.training import ranks
from lora2serve.training.layer_compilation import FEWEST_STEPS
from lora2serve.training.method_outlook import plan_settings
from lora2serve.training.model import Device, device_model, free_memory
from lora2serve.training.packing import attend_by_document, keep_apart
from lora2serve.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from peft import PeftModel


def choose_loop(
    recipe: Recipe, run: Run, base: Path, device: Device, progress: Progress, *, resume: bool
) -> LoopRecord:
    """By the plan of memory, before the base is loaded; of a run that goes on, what it began with.

    Of several processes all do as the first one has chosen.
    """
    loop = _chosen(replace(recipe, train=share(recipe.train)), run, base, device, resume=resume)
    if loop.processes != ranks.processes():
        progress.warn(
            f"{run.path}: begun by {loop.processes} processes, and {ranks.processes()} go on with it: a step has the "
            "same rows, and sums round differently"
        )
        loop = _for_processes(loop, ranks.processes())
    return LoopRecord.from_text(ranks.of_first(json.dumps(loop.to_json())), "loop")


def share(train: TrainRecipe) -> TrainRecipe:
    """What each process does of a step; TrainError where they cannot have the same number of rows, or cannot sum up."""
    processes = ranks.processes()
    if processes > 1 and train.objective != SFT:
        raise TrainError(f"train.objective: {train.objective} trains in one process, and {processes} were started")
    return share_of(train, processes)


def _for_processes(loop: LoopRecord, processes: int) -> LoopRecord:
    """The same rows a step by another number of processes."""
    rows = loop.rows * loop.accumulation * loop.processes // processes
    sharded = loop.sharded and processes > 1
    return replace(_at_most(min(loop.rows, rows), rows, loop), processes=processes, sharded=sharded)


def _chosen(recipe: Recipe, run: Run, base: Path, device: Device, *, resume: bool) -> LoopRecord:
    gpu = device_model(device)
    if resume:
        return run.record.loop or _earlier_release(recipe, gpu)
    gpu = replace(gpu, memory=free_memory(device))
    with suppress(InputError, UsageError):  # a model, or modules to adapt, that the closed form does not know
        if not recipe.train.lora.dora:  # of which it knows half
            return _record(_planned(recipe, base, gpu))
    sharded = recipe.train.parallel == "fsdp" and ranks.processes() > 1
    return replace(_record(recipe_step(recipe.train, recipe.data.max_length, gpu)), sharded=sharded)


def _planned(recipe: Recipe, base: Path, gpu: GpuModel) -> StepChoice:
    ratio, _ = measured_ratio(gpu.name)
    checkpoint = Checkpoint(base)
    settings = plan_settings(recipe.train, recipe.data, base, gpu.dtype)
    shape = model_shape(checkpoint.config, checkpoint.specs())
    return choose_parallel(shape, settings, recipe.train, gpu, ranks.processes(), ratio)


def _record(choice: StepChoice) -> LoopRecord:
    settings = choice.settings
    return LoopRecord(
        choice.optimizer, settings.checkpointing, settings.batch, choice.accumulation, ranks.processes(),
        sharded=settings.shards > 1,
    )  # fmt: skip


def _earlier_release(recipe: Recipe, gpu: GpuModel) -> LoopRecord:
    """What a run does of which that is not on record."""
    choice = recipe_step(recipe.train, recipe.data.max_length, gpu)
    optimizer = "adamw_torch" if choice.optimizer == "adamw_torch_fused" else choice.optimizer
    return replace(_record(choice), optimizer=optimizer, compiled=False, varlen=False)


def decided(loop: LoopRecord, model: PeftModel, rows: Sequence[Sample], recipe: Recipe, device: Device) -> LoopRecord:
    """With what the model itself has to say: where rows can attend by themselves, they do from now on.

    On a CPU only packed rows do; never rows with a learned prompt in front of each, nor answers to compare, which
    TRL pads. Layers of the latter are not compiled either: they run with the adapter and without.
    """
    varlen = loop.varlen
    if recipe.train.objective != SFT:
        return replace(loop, varlen=False, compiled=False)
    if recipe.train.method in (*PROMPTS, *STATES):
        varlen = False
    elif varlen is not False:
        varlen = (device.on_gpu or recipe.data.packing) and attend_by_document(model, rows)
    return replace(loop, varlen=varlen)


def with_compiler(loop: LoopRecord, total: int, device: Device) -> LoopRecord:
    """Compiled on a GPU where the steps are many enough to bring the time back."""
    if loop.compiled is not None:
        return loop
    return replace(loop, compiled=device.on_gpu and total >= FEWEST_STEPS and not loop.sharded)


def in_parts(loop: LoopRecord, count: int) -> LoopRecord:
    """With batches in so many parts, or more, so that steps keep their rows."""
    return _at_most(-(-loop.rows // count), loop.rows * loop.accumulation, loop)


def _at_most(most: int, rows: int, loop: LoopRecord) -> LoopRecord:
    """With ``rows`` a step in even batches, as large as ``most`` lets them be."""
    at_once = next(size for size in range(most, 0, -1) if rows % size == 0)
    return replace(loop, rows=at_once, accumulation=rows // at_once)


def planned_settings(recipe: Recipe, loop: LoopRecord, base: Path, device: Device) -> PlanSettings:
    """For the plan of a run that goes so."""
    return replace(
        plan_settings(recipe.train, recipe.data, base, device.dtype), batch=loop.rows,
        shards=loop.processes if loop.sharded else 1,
        checkpointing=loop.checkpointing, accumulates=loop.accumulation > 1,
        padded=recipe.train.objective != SFT or (loop.rows > 1 and not loop.varlen),
    )  # fmt: skip


def packs(recipe: Recipe, loop: LoopRecord, model: PeftModel, rows: Sequence[Sample], progress: Progress) -> bool:
    """Whether rows share a sequence: the recipe asks for it, and they do not see each other."""
    return recipe.data.packing and (bool(loop.varlen) or keep_apart(model, rows, progress))
