"""How a training does a step: rows at once, activations kept or computed twice, which AdamW: what fits, fastest first.

A recipe says how many rows an optimizer step has (``batch_size`` times ``accumulation``); their gradient is the same in
whatever pieces they go through the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

from lora2serve.config.objectives import SFT
from lora2serve.config.recipe import TrainRecipe, unshardable
from lora2serve.config.train_methods import STATES
from lora2serve.errors import TrainError
from lora2serve.planning.gpus import GpuModel
from lora2serve.planning.memory_plan import USABLE, planned_bytes
from lora2serve.planning.model_shape import ModelShape
from lora2serve.planning.plan_settings import PlanSettings, settings_of

Optimizer = Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"]
BUSY = 8192  # tokens at once that keep a GPU busy: from there on, computing activations twice costs more than pieces do
GPU_SHARE = 0.9  # of its memory: room for what a plan does not know; what is too much all the same goes in halves
CPU_SHARE = 0.5  # others live there, too


@dataclass(frozen=True)
class StepChoice:
    """``settings.batch`` rows go through the model at once, ``accumulation`` times in one optimizer step."""

    settings: PlanSettings
    accumulation: int
    optimizer: Optimizer


def recipe_step(train: TrainRecipe, length: int, gpu: GpuModel) -> StepChoice:
    """As the recipe has it, with every default on the safe side: for a model whose memory is not known."""
    settings = settings_of(train, length, gpu.dtype)
    return StepChoice(settings, train.accumulation, _optimizer(settings, short=settings.method == "qlora"))


def choose_step(
    shape: ModelShape, settings: PlanSettings, train: TrainRecipe, gpu: GpuModel, ratio: float = 1.0
) -> StepChoice:
    """What is fastest of what fits into ``gpu``; where nothing does, what takes least.

    The loss that balances experts is one of the rows that go through at once, and KTO compares these with each other:
    they stay as the recipe has them.
    settings: what else is trained, such as ``settings_of(train, ...)``.
    ratio: measured to planned bytes of earlier runs.
    """
    rows = train.batch_size * train.accumulation
    most = gpu.memory * (CPU_SHARE if settings.on_cpu else GPU_SHARE)
    ways = list(_ways(settings, train, rows, in_pieces=not shape.experts and train.objective != "kto"))

    def needs(way: PlanSettings) -> int:
        return planned_bytes(shape, way, ratio).total

    fitting = (way for limit in (most, gpu.memory * USABLE) for way in ways if needs(way) <= limit)
    chosen = next(fitting, None) or min(ways, key=needs)
    return StepChoice(chosen, rows // chosen.batch, _optimizer(chosen, short=needs(chosen) > most))


def share_of(train: TrainRecipe, processes: int) -> TrainRecipe:
    """What each of them does of a step; TrainError where they cannot have the same number of rows."""
    rows = train.batch_size * train.accumulation
    if rows % processes:
        near = sorted({rows // processes * processes, (rows // processes + 1) * processes} - {0})
        raise TrainError(
            f"train.batch_size times accumulation: {rows} rows a step, which {processes} processes cannot share evenly",
            f"set them to {' or '.join(map(str, near))} rows in all",
        )
    common = gcd(train.batch_size, processes)
    return replace(
        train, batch_size=train.batch_size // common, accumulation=train.accumulation // (processes // common)
    )


def choose_parallel(
    shape: ModelShape, settings: PlanSettings, train: TrainRecipe, gpu: GpuModel, processes: int, ratio: float = 1.0
) -> StepChoice:  # fmt: skip
    """``choose_step`` for one of several processes: with the whole base in each, or with a part of it.

    As ``train.parallel`` says; ``auto`` cuts the base only where ``gpu`` does not hold the training with a whole one.
    """
    whole = choose_step(shape, settings, train, gpu, ratio)
    if processes == 1 or train.parallel == "ddp" or any(unshardable(train)):
        return whole
    fits = planned_bytes(shape, whole.settings, ratio).total <= gpu.memory * USABLE
    if fits and train.parallel == "auto":
        return whole
    return choose_step(shape, replace(settings, shards=processes), train, gpu, ratio)


def _ways(settings: PlanSettings, train: TrainRecipe, rows: int, *, in_pieces: bool) -> Iterator[PlanSettings]:
    """The fastest first: no activation twice with rows enough to keep a GPU busy, then twice, then with few rows.

    A CPU gains nothing by more rows at once than the recipe has in a batch.
    """
    asked = False if train.method in STATES else train.gradient_checkpointing
    most = train.batch_size if settings.on_cpu else rows
    batches = [batch for batch in range(most, 0, -1) if rows % batch == 0] if in_pieces else [train.batch_size]
    busy = [batch for batch in batches if batch == batches[0]]
    each = settings.answers * settings.length
    busy += [batch for batch in batches[1:] if batch * each >= BUSY and not settings.on_cpu]
    order = [(batch, False) for batch in busy] + [(batch, True) for batch in batches]
    order += [(batch, False) for batch in batches if batch not in busy]
    for batch, checkpointing in order:
        if asked in (None, checkpointing):
            padded = batch > 1 or settings.objective != SFT
            yield replace(settings, batch=batch, checkpointing=checkpointing, accumulates=batch < rows, padded=padded)


def _optimizer(settings: PlanSettings, *, short: bool) -> Optimizer:
    """Fused on a GPU; where memory is short, one whose state may move to the host's."""
    if settings.on_cpu:
        return "adamw_torch"
    return "paged_adamw_32bit" if short else "adamw_torch_fused"
