"""What a training needs of the Hub, fetched into the cache by a process that may: workers are offline."""

from __future__ import annotations

from pathlib import Path

from lora2serve.api.locate import locate
from lora2serve.api.train_run import fetch_base
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.config.recipe import Recipe
from lora2serve.data import data_sets
from lora2serve.hub import pin_data
from lora2serve.progress import Progress


def fetch_inputs(recipe: Recipe, progress: Progress) -> None:
    """Data, the adapter that it starts from, and the base; Lora2ServeError for what cannot be had."""
    if _is_remote(recipe.data):
        data_sets.load(recipe.data, pin_data, recipe.train.objective)
    if recipe.train.from_adapter:
        locate(recipe.train.from_adapter, progress)
    fetch_base(recipe.model, progress)


def _is_remote(data: DataRecipe) -> bool:
    return any(not Path(source.path).exists() for kind in ("train", "eval") for source in data.sources(kind))
