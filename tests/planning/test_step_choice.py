"""How a step is done, by the plan of memory: the fastest that fits, and the least where nothing does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora2serve.config.recipe import TrainRecipe
from lora2serve.planning.gpus import GpuModel, find_gpu
from lora2serve.planning.memory_plan import planned_bytes
from lora2serve.planning.model_shape import ExpertShape, ModelShape, model_shape
from lora2serve.planning.plan_settings import settings_of
from lora2serve.planning.step_choice import GPU_SHARE, StepChoice, choose_step, recipe_step
from tests.planning.conftest import LLAMA3_8B, LLAMA3_70B, TINYLLAMA

ON, OFF = True, False


def choice(shape: ModelShape, gpu: GpuModel, ratio: float = 1.0, **train: object) -> StepChoice:
    recipe = TrainRecipe(**train)  # type: ignore[arg-type]
    return choose_step(shape, settings_of(recipe, 1024, gpu.dtype), recipe, gpu, ratio)


@pytest.mark.parametrize(
    ("config", "gpu", "train", "rows", "times", "checkpointing", "optimizer"),
    [
        (TINYLLAMA, "h100", {"batch_size": 4, "accumulation": 4}, 16, 1, OFF, "adamw_torch_fused"),
        (TINYLLAMA, "8", {"batch_size": 4, "accumulation": 4}, 16, 1, ON, "adamw_torch_fused"),
        (LLAMA3_8B, "h100", {}, 8, 1, OFF, "adamw_torch_fused"),
        (LLAMA3_8B, "24", {}, 8, 1, ON, "adamw_torch_fused"),
        (LLAMA3_8B, "24", {"gradient_checkpointing": False}, 2, 4, OFF, "adamw_torch_fused"),
        (LLAMA3_8B, "10", {}, 4, 2, ON, "adamw_torch_fused"),
        (LLAMA3_8B, "t4", {}, 4, 2, ON, "adamw_torch_fused"),
        (LLAMA3_70B, "a100-40", {}, 1, 8, ON, "paged_adamw_32bit"),
    ],
)
def test_the_fastest_that_fits(
    config: dict[str, object], gpu: str, train: dict[str, object], rows: int, times: int, checkpointing: bool,
    optimizer: str,
) -> None:  # fmt: skip
    shape, card = model_shape(config, None), find_gpu(gpu)
    made = choice(shape, card, **train)
    assert (made.settings.batch, made.accumulation, made.settings.checkpointing) == (rows, times, checkpointing)
    assert made.optimizer == optimizer
    if optimizer != "paged_adamw_32bit":
        assert planned_bytes(shape, made.settings).total <= GPU_SHARE * card.memory


def test_rows_of_a_step_are_whole_pieces() -> None:
    shape = model_shape(LLAMA3_8B, None)
    for rows in (5, 6, 7, 12):
        made = choice(shape, find_gpu("10"), batch_size=rows)
        assert made.settings.batch * made.accumulation == rows


def test_what_earlier_runs_took_is_counted() -> None:
    shape = model_shape(LLAMA3_8B, None)
    assert choice(shape, find_gpu("10"), 1.4).settings.batch < choice(shape, find_gpu("10")).settings.batch


def test_experts_are_balanced_over_the_rows_that_the_recipe_has_at_once() -> None:
    shape = model_shape(LLAMA3_8B, None)
    made = choice(
        replace(shape, experts=(ExpertShape("experts.down_proj", 2, 64, 64),)),
        find_gpu("8"),
        batch_size=4,
        accumulation=2,
    )
    assert (made.settings.batch, made.accumulation) == (4, 2)
    assert choice(shape, find_gpu("8"), batch_size=4, accumulation=2).settings.batch == 1, "the control"


def test_a_cpu_computes_activations_once_where_half_of_its_memory_holds_them() -> None:
    shape = model_shape(TINYLLAMA, None)
    large, small = (GpuModel("the main memory", gib << 30, "float32") for gib in (64, 12))
    kept, twice = (choice(shape, cpu, batch_size=4, accumulation=2) for cpu in (large, small))
    assert (kept.settings.batch, kept.settings.checkpointing, kept.optimizer) == (4, False, "adamw_torch")
    assert (twice.settings.batch, twice.settings.checkpointing) == (4, True)


def test_a_model_that_no_plan_knows_is_trained_as_the_recipe_says() -> None:
    made = recipe_step(TrainRecipe(batch_size=3, accumulation=2), 1024, find_gpu("24"))
    assert (made.settings.batch, made.accumulation, made.settings.checkpointing) == (3, 2, True)
    assert made.optimizer == "paged_adamw_32bit"


def test_two_answers_are_two_rows_and_labeled_ones_stay_together() -> None:
    """Of dpo as many tokens as of twice the rows; kto compares the rows of a batch, which is not cut."""
    shape, card = model_shape(LLAMA3_8B, None), find_gpu("10")
    sft, dpo, kto = (settings_of(TrainRecipe(objective=name), 1024, "bfloat16") for name in ("sft", "dpo", "kto"))
    assert (dpo.tokens, kto.tokens) == (2 * sft.tokens, sft.tokens)
    assert planned_bytes(shape, dpo) == planned_bytes(shape, replace(sft, batch=16))
    assert choice(shape, card, objective="dpo").settings.batch < choice(shape, card).settings.batch == 4
    made = choice(shape, card, objective="kto", batch_size=4, accumulation=4)
    assert (made.settings.batch, made.accumulation) == (4, 4)
    assert made.settings.padded and replace(made.settings, batch=1).padded
