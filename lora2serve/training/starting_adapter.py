"""``train.from_adapter``: a training that goes on from an adapter that is there already."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.adapters.adapter import CONFIG, open_adapter, read_config
from lora2serve.adapters.trained_tokens import trained_tokens
from lora2serve.config.lora_inits import changes_base, init_of
from lora2serve.config.method_options import config_class, option_names
from lora2serve.config.recipe import EXPERTS, PRESETS, LoraRecipe, TrainRecipe
from lora2serve.config.schema import show
from lora2serve.config.train_methods import LORA, TRAINABLE
from lora2serve.errors import TrainError, first_line, raise_all
from lora2serve.system.hub_snapshot import hub_snapshot
from lora2serve.system.small_files import JsonObject

if TYPE_CHECKING:
    from peft import PeftModel

KEY = "train.from_adapter"
# What was trained is not in the file: p-tuning's encoder, AdaLoRA's ranks as they were before it dealt them out.
NOT_SAVED = ("p_tuning", "adalora")
OF_RECIPE: Mapping[str, str] = {
    "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save", "rslora": "use_rslora", "dora": "use_dora",
}  # fmt: skip
OF_RUN = (
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "exclude_modules",
    "init_lora_weights", "fan_in_fan_out", "auto_mapping", "peft_type", "trainable_token_indices",
)  # fmt: skip


def starting_from(
    train: TrainRecipe, adapter: Path, named: Collection[str], new_tokens: Sequence[str] = ()
) -> TrainRecipe:  # fmt: skip
    """The recipe with the kind and the settings of the adapter in that directory, and its path.

    named: paths of the recipe's own values, beside its defaults. new_tokens: those of ``data``, which have to be the
    adapter's.
    TrainError for an adapter that cannot be gone on from, and for settings of the recipe that are not its own.
    """
    config = read_config(adapter)
    method = str(config.get("peft_type", "LORA")).lower()
    if method not in TRAINABLE or method in NOT_SAVED or config.get("prefix_projection"):
        raise TrainError(
            f"{KEY}: {adapter}: a training cannot go on from {method}: what it trained is not all in the file",
            "train it from the start",
        )
    raise_all([f"{KEY}: {adapter / CONFIG}: {problem}" for problem in _inexpressible(method, config)], TrainError)
    open_adapter(adapter)  # what is no whole file of weights, it refuses by name
    if method == LORA:
        _refuse_other_tokens(adapter, config, new_tokens)
    own = replace(train, method=method, from_adapter=str(adapter))
    own = replace(own, lora=_lora(config)) if method == LORA else replace(own, options=_options(method, config))
    problems = [
        f"{key}: {show(value)}, but the adapter of {KEY} has {show(theirs)}"
        for key, value, theirs in _settings(train, own, config)
        if key in named and value != theirs
    ]
    raise_all(problems, lambda text: TrainError(text, f"leave it out: {KEY} says it"))
    return own


def _refuse_other_tokens(adapter: Path, config: JsonObject, new_tokens: Sequence[str]) -> None:
    """TrainError where the adapter trains the rows of other tokens than the recipe."""
    theirs = list(trained_tokens(adapter).values()) if config.get("trainable_token_indices") else []
    if theirs != list(new_tokens):  # by their order they have their ids
        raise TrainError(
            f"data.new_tokens: {show(list(new_tokens))}, but the adapter of {KEY} has {show(theirs)}",
            f"set data.new_tokens: {json.dumps(theirs, ensure_ascii=False)}",
        )


def settings_in_words(train: TrainRecipe) -> str:
    """What the adapter that a recipe starts from is: ``lora of rank 8, alpha 16, on q_proj, v_proj``."""
    if train.method != LORA:
        options = ", ".join(f"{name} {show(value)}" for name, value in train.options.items())
        return f"{train.method}{' with ' if options else ''}{options}"
    on = [*train.lora.targets, *train.lora.target_parameters]
    return f"lora of rank {train.lora.rank}, alpha {train.lora.alpha:g}, on {', '.join(on)}"


def other_base(adapter: Path, base: Path, name: str) -> list[str]:
    """A warning where the adapter names another base than the one in ``base``, which the recipe calls ``name``."""
    trained_on = str(read_config(adapter).get("base_model_name_or_path") or "")
    snapshot = hub_snapshot(base)
    known = {name, str(base), snapshot.id if snapshot else ""}
    if not trained_on or Path(trained_on).name in {Path(item).name for item in known}:
        return []
    return [f"{KEY}: {adapter} was trained on {trained_on}, and goes on on {name}"]


def load_weights(model: PeftModel, adapter: Path) -> None:
    """Those of the adapter into a model with a fresh one of the same configuration."""
    way_out = "name its base in model.path"
    try:
        loaded = model.load_adapter(str(adapter), "default", is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainError(f"{KEY}: {adapter} does not fit this base ({first_line(error)})", way_out) from error
    apart = [*loaded.missing_keys, *loaded.unexpected_keys]
    if apart and not model.peft_config["default"].is_prompt_learning:  # whose one table is loaded apart, strictly
        more = f" and {len(apart) - 1} more" if apart[1:] else ""
        raise TrainError(f"{KEY}: {adapter} does not fit this base ({apart[0]}{more})", way_out)


def _lora(config: JsonObject) -> LoraRecipe:
    default = LoraRecipe()
    values = {name: config.get(key) or getattr(default, name) for name, key in OF_RECIPE.items()}
    values |= {"targets": tuple(sorted(config["target_modules"])), "modules_to_save": tuple(values["modules_to_save"])}
    values["target_parameters"] = tuple(sorted(values["target_parameters"]))
    return LoraRecipe(**{**values, "dropout": config.get("lora_dropout") or 0.0})


def _options(method: str, config: JsonObject) -> dict[str, object]:
    """The options that are not PEFT's defaults."""
    default = config_class(method)(task_type="CAUSAL_LM")
    return {
        name: config[name]
        for name in option_names(method)
        if config.get(name) is not None and config[name] != getattr(default, name) and name not in OF_RUN
    }


def _inexpressible(method: str, config: JsonObject) -> Iterator[str]:
    """What of a LoRA no recipe says."""
    if method != LORA:
        return
    if changes_base(init_of(config)):
        yield f"init_lora_weights is {config['init_lora_weights']!r}, which took a part of the base out"
    named = config.get("target_modules")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        yield f"target_modules is {named!r}, expected a list of names"
    known, default = {*OF_RECIPE.values(), *OF_RUN}, config_class(LORA)(task_type="CAUSAL_LM").to_dict()
    for name, value in config.items():
        if name in default and name not in known and value and value != default[name]:
            yield f"{name} is {show(value)}, which no recipe says"


def _settings(train: TrainRecipe, own: TrainRecipe, config: JsonObject) -> Iterator[tuple[str, object, object]]:
    """Each setting of the adapter: its key, the recipe's value, the adapter's. A preset of modules is any of them."""
    yield "train.method", train.method, own.method
    for name, value in train.options.items():
        theirs = _ordered(config.get(name))
        yield f"train.options.{name}", theirs if _is_preset(name, value) else _ordered(value), theirs
    for item in fields(LoraRecipe) if own.method == LORA else ():
        value, theirs = getattr(train.lora, item.name), getattr(own.lora, item.name)
        yield f"train.lora.{item.name}", theirs if _is_preset(item.name, value) else _ordered(value), _ordered(theirs)


def _is_preset(name: str, value: object) -> bool:
    names_experts = (name, value) == ("target_parameters", EXPERTS)
    return names_experts or (name in ("targets", "target_modules") and value in PRESETS)


def _ordered(value: object) -> object:
    """Names of modules come back from PEFT in any order."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(sorted(value))
    return value
