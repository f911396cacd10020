"""A config of Axolotl or LLaMA-Factory as the YAML of a recipe, with every key that it could not take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.config.other_names import OTHER_NAMES
from lora2serve.config.recipe import Recipe, problems_of
from lora2serve.config.schema import build, read_keys
from lora2serve.config.translation.axolotl_config import from_axolotl
from lora2serve.config.translation.llamafactory_config import from_llamafactory
from lora2serve.config.translation.moved_keys import LeftOut, MovedKeys
from lora2serve.errors import RecipeError

EXPECTED = (
    "expected a config of Axolotl (base_model) or LLaMA-Factory (model_name_or_path), or a built-in recipe's name"
)


@dataclass(frozen=True)
class TranslatedRecipe:
    """``text`` is the recipe, with what was left out in its first lines."""

    trainer: str
    text: str
    left_out: Sequence[LeftOut]


def translate(path: Path) -> TranslatedRecipe:
    """RecipeError for a file that is no such config, or lacks what a recipe cannot do without."""
    config, repeated = read_keys(path, EXPECTED)
    trainer, keys = move_keys(config, path)
    for problem in repeated:
        keys.leave(problem, "", "the last one is taken")
    return TranslatedRecipe(trainer, _text(path, trainer, keys), keys.left_out)


def move_keys(config: Mapping[str, object], path: Path) -> tuple[str, MovedKeys]:
    """Which trainer the config of the file ``path`` is for, and its keys in a recipe that the schema takes."""
    if "base_model" in config:
        trainer, keys = "Axolotl", from_axolotl(config)
    elif "model_name_or_path" in config:
        trainer, keys = "LLaMA-Factory", from_llamafactory(config, path.resolve().parent)
    else:
        raise RecipeError(f"{path}: neither base_model nor model_name_or_path", EXPECTED)
    _withdraw_wrong(path, keys)
    return trainer, keys


def _withdraw_wrong(path: Path, keys: MovedKeys) -> None:
    """What the schema does not take is left out with the schema's own words."""
    for _ in range(100):
        problems: list[str] = []
        problems_of(build(Recipe, keys.recipe, problems, OTHER_NAMES), problems)
        if not problems:
            return
        place, _, why = problems[0].partition(": ")
        at = re.sub(r"\[.*", "", place)
        if why == "missing" or keys.get(at) is None:
            raise RecipeError(f"{path}: no recipe without it: {problems[0]}", EXPECTED)
        keys.withdraw(at, why)
    raise RecipeError(f"{path}: {problems[0]}", EXPECTED)


def _text(path: Path, trainer: str, keys: MovedKeys) -> str:
    import yaml

    lines = ["# lora2serve train", f"# from {path.name} of {trainer}"]
    if keys.left_out:
        lines += ["#", "# without:", *(f"#   {item.line()}" for item in keys.left_out)]
    order = ("name", "model", "data", "train")
    content = {name: keys.recipe[name] for name in order if name in keys.recipe}
    return "\n".join(lines) + "\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
