"""What of a recipe its ``train.method`` rules out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from lora2serve.config.method_options import read_options
from lora2serve.config.schema import show
from lora2serve.config.train_methods import LORA, ON_FOUR_BITS, PROMPTS, STATES, TRAINABLE, UNTRAINABLE
from lora2serve.errors import did_you_mean

if TYPE_CHECKING:
    from lora2serve.config.recipe import Recipe, TrainRecipe


def problems_of_method(recipe: Recipe) -> list[str]:
    """One line each; the adapter of a LoRA is checked by its own section."""
    train, method = recipe.train, recipe.train.method
    if method in UNTRAINABLE:
        return [f"train.method: {method} cannot be trained here: {UNTRAINABLE[method]}"]
    if method not in TRAINABLE:
        near = did_you_mean(method, TRAINABLE)
        return [f"train.method: {show(method)}, expected one of {', '.join(sorted(TRAINABLE))}{near}"]
    if method == LORA:
        names = ", ".join(map(show, train.options))
        return [f"train.options: {names}, expected none with train.method: lora (see train.lora)"] if names else []
    problems = list(_of_other_sections(recipe))
    if recipe.data.new_tokens:
        problems.append(f"data.new_tokens: {method} trains no rows of embedding and head beside it, lora does")
    read_options(method, train.options, problems)
    return problems


def _of_other_sections(recipe: Recipe) -> Iterator[str]:
    train, method = recipe.train, recipe.train.method
    for name, value in _changed(train):
        yield f"train.lora.{name}: {show(value)}, but train.method is {method}, whose options are in train.options"
    if train.quantize != "none" and method not in ON_FOUR_BITS:
        yield f"train.quantize: {train.quantize}, but {method} computes with the weights of the base: set it to none"
    if method in STATES and train.gradient_checkpointing:
        yield f"train.gradient_checkpointing: true, but {method} has keys and values that no second pass would see"
    if method in (*PROMPTS, *STATES) and recipe.data.packing:
        yield f"data.packing: true, but {method} comes in front of each row, and rows would share it"
    if method == "cpt" and not train.options.get("cpt_token_ids"):
        yield "train.options.cpt_token_ids: missing: the ids of a text with examples, which begin each row"
    if method == "cpt" and train.options.get("opt_weighted_loss_type") == "decay":
        yield "train.options.opt_weighted_loss_type: 'decay', expected 'none': all tokens count alike"
    if method == "trainable_tokens" and not train.options.get("token_indices"):
        yield "train.options.token_indices: missing: the ids of the tokens to train"


def _changed(train: TrainRecipe) -> Iterator[tuple[str, object]]:
    """The fields of ``train.lora`` that are not as they are by default."""
    default = type(train.lora)()
    for item in fields(default):
        value = getattr(train.lora, item.name)
        if value != getattr(default, item.name):
            yield item.name, value
