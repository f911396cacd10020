"""How many optimizer steps a run takes, and after which of them it is evaluated."""

from __future__ import annotations

import math

from lora2serve.config.recipe import Recipe


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps in all, for that many (packed) rows."""
    each_epoch = math.ceil(rows / (recipe.train.batch_size * recipe.train.accumulation))
    return recipe.train.steps or max(1, math.ceil(each_epoch * recipe.train.epochs))


def eval_interval(recipe: Recipe, total: int) -> int:
    """Optimizer steps between two evaluations: those of the recipe, or an epoch."""
    train = recipe.train
    each_epoch = max(1, math.ceil(total / max(1.0, train.epochs))) if train.steps is None else total
    return min(train.eval_steps or each_epoch, total)
