"""What an adapter will be, before its base is read: how much it learns, in how much memory, and who will serve it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lora2serve.adapters.kind_targets import Way, as_named, serving_targets, way_out, why_not
from lora2serve.adapters.peft_methods import BIAS_ALONE, UNMERGEABLE_METHODS
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.config.objectives import SFT
from lora2serve.config.recipe import Recipe, TrainRecipe
from lora2serve.config.train_methods import LORA
from lora2serve.errors import CheckpointError, InputError, UsageError
from lora2serve.planning.memory_plan import planned_bytes
from lora2serve.planning.model_shape import model_shape
from lora2serve.planning.plan_settings import ComputeType, PlanSettings, settings_of
from lora2serve.planning.static_memory import trainable
from lora2serve.planning.step_choice import choose_step
from lora2serve.progress import Progress
from lora2serve.training.model import Device, device_model
from lora2serve.training.weightless import learned_values
from lora2serve.weights.checkpoint import Checkpoint

WORDS: Mapping[Way, str] = {
    "merged": "merged", "prompt": "as tokens in front", "adapter": "beside its base", "lora": "with --as-lora-rank",
}  # fmt: skip


def foretell(recipe: Recipe, base: Path, device: Device, progress: Progress) -> None:
    """Say it: one note on size and memory, and one on who serves it, which is a warning where nobody does."""
    with suppress(InputError, UsageError):  # no plan can be made of this model, or of the modules that it adapts
        checkpoint = Checkpoint(base)
        settings = plan_settings(recipe.train, recipe.data, base, device.dtype)
        shape = model_shape(checkpoint.config, checkpoint.specs())
        settings = choose_step(shape, settings, recipe.train, device_model(device)).settings
        learned, total = trainable(shape, settings), planned_bytes(shape, settings).total
        progress.note(
            f"{recipe.train.method} learns {learned:,} of {shape.parameters:,} values "
            f"({learned / shape.parameters:.2%}), in about {total / 1e9:.2f} GB of memory"
        )
    if recipe.train.method == LORA:  # whether it can be one of several is said with its configuration
        return
    text, refused = served_by(recipe.train.method)
    (progress.warn if refused else progress.note)(text)


def kind_of_training(train: TrainRecipe) -> str:
    """In words, as in the first line of a run."""
    by = "" if train.objective == SFT else f"{train.objective.upper()} by "
    if train.method == LORA:
        return f"{by}LoRA" if train.quantize == "none" else f"{by}QLoRA ({train.quantize})"
    return f"{by}{train.method}" if train.quantize == "none" else f"{by}{train.method} ({train.quantize})"


def plan_settings(train: TrainRecipe, data: DataRecipe, base: Path, dtype: ComputeType) -> PlanSettings:
    """What decides the memory of training on rows of ``data.max_length``; CheckpointError where PEFT needs weights."""
    settings = settings_of(train, data.max_length, dtype, len(data.new_tokens))
    if train.method == LORA:
        return settings
    learned = learned_values(base, train)
    if learned is None:
        raise CheckpointError(f"{base}: only its weights say how much {train.method} learns")
    return replace(settings, learned=learned)


def served_by(method: str) -> tuple[str, bool]:
    """One line, and whether it is a warning: nobody but PEFT serves some kinds. ``method`` as a recipe names it."""
    kind = method.upper()
    ways = serving_targets(kind)
    biases = " into modules with a bias" if kind in BIAS_ALONE else ""
    parts = [f"{', '.join(map(as_named, ways[way]))} ({words}{biases})" for way, words in WORDS.items() if way in ways]
    if not parts:
        return f"{method}: {way_out(kind, 'vllm')} ({UNMERGEABLE_METHODS[kind]})", True
    no = ways.get("no", [])
    refused = f"; not by {', '.join(map(as_named, no))}: {why_not(kind, no[-1])}" if no else ""
    return f"{method} is served by --target {', '.join(parts)}{refused}", False
