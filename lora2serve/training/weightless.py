"""The model without its weights: what the recipe's adapter needs of it is met before gigabytes are read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.adapters.peft_methods import BIAS_ALONE, has_bias
from lora2serve.adapters.target_presets import named
from lora2serve.config.recipe import TrainRecipe
from lora2serve.config.train_methods import LORA
from lora2serve.data.new_tokens import NO_TOKENS, NewTokens
from lora2serve.errors import TrainError, first_line
from lora2serve.training.lora_targets import expert_parameters, linear_modules, other_towers
from lora2serve.training.method_config import adapter_config
from lora2serve.training.model import UNFIT, Device, section_of
from lora2serve.training.new_rows import grow
from lora2serve.weights.checkpoint import read_config
from lora2serve.weights.language_model import weightless_language_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


def check_adapter(
    base: Path, recipe: TrainRecipe, device: Device, new_tokens: NewTokens = NO_TOKENS
) -> list[str]:  # fmt: skip
    """Warnings of what the model of ``base`` leaves out; TrainError for an adapter that it cannot carry."""
    model = weightless_model(base)
    if model is None:
        return []
    grow(model, new_tokens.rows)
    config = adapter_config(model, recipe, base, new_tokens.ids)
    return _of_lora(model, base, recipe, config, device) if recipe.method == LORA else _of_others(model, config)


def learned_values(base: Path, recipe: TrainRecipe) -> int | None:
    """How many values the recipe's adapter learns on the model of ``base``; None where PEFT needs weights to say."""
    model = weightless_model(base)
    adapted = model and _put_on(model, adapter_config(model, recipe, base))
    if adapted is None:
        return None
    return int(sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad))


def _of_others(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """What the model has no place for; TrainError where PEFT refuses it."""
    targets = named(linear_modules(model), list(config.target_modules)) if config.peft_type in BIAS_ALONE else []
    bare = [name for name in targets if not has_bias(model.get_submodule(name))]
    _put_on(model, config)
    if bare:
        return [
            f"train.method: {config.peft_type.lower()} learns biases, and no target holds those of modules without "
            f"one: {_in_all_layers(bare)}; name others in train.options.target_modules, or serve it by "
            "`lora2serve serve --engine peft`"
        ]
    if config.peft_type == "IA3" and not config.feedforward_modules:
        return ["train.method: ia3 scales no way back from an MLP: this model has none that is a linear layer"]
    return []


def _in_all_layers(modules: Collection[str]) -> str:
    """Names of modules, those of all layers once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in sorted(modules)))


def _of_lora(
    model: PreTrainedModel, base: Path, recipe: TrainRecipe, config: LoraConfig, device: Device
) -> list[str]:  # fmt: skip
    towers = re.compile(other_towers(model) or r"(?!)")  # what sees and hears gets no LoRA, and is no expert
    experts = expert_parameters(model)
    quantizes = recipe.quantize != "none" and not read_config(base).get("quantization_config")
    wide = _in_16_bits(model, experts, recipe, device) if quantizes else []  # before PEFT wraps them
    linear = {name for name in named(linear_modules(model), list(config.target_modules)) if not towers.fullmatch(name)}
    adapted = _adapted(model, config)
    warnings = []
    if left_out := linear - (adapted or linear):
        warnings.append(
            f"no LoRA on {_in_all_layers(left_out)}: of a mixture of experts PEFT adapts either these or the others"
        )
    if bare := experts.keys() - (adapted or experts.keys()):
        warnings.append(
            f"no LoRA on {_in_all_layers(bare)}: train.lora.target_parameters: experts puts one on each expert"
        )
    return [*warnings, *wide]


def _in_16_bits(model: PreTrainedModel, experts: Mapping[str, int], recipe: TrainRecipe, device: Device) -> list[str]:
    """What stays so beside a 4-bit base."""
    from lora2serve.training.expert_layers import quantizable

    owners = dict(model.named_modules())
    left = [name for name in experts if not quantizable(owners[name.rpartition(".")[0]], name.rpartition(".")[2])]
    if not left:
        return []
    size = sum(experts[name] for name in left) * (4 if device.dtype == "float32" else 2) / 1e9
    return [
        f"train.quantize: {recipe.quantize} leaves {size:.1f} GB of experts in {device.dtype}: transformers computes "
        f"{_in_all_layers(left)} in one way only, or they are no whole number of blocks of 64"
    ]


def _adapted(model: PreTrainedModel, config: LoraConfig) -> set[str] | None:
    """The modules and parameters that get a LoRA: PEFT takes names of experts for the tensor that holds them all.

    None where PEFT needs weights to say.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    adapted = _put_on(model, replace(config, init_lora_weights=False, use_dora=False))
    if adapted is None:
        return None
    found = set()
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            owner = re.sub(r"(\.base_layer)+$", "", name)
            found.add(f"{owner}.{module.parameter_name}")
        elif isinstance(module, LoraLayer):
            found.add(name)
    return found


def _put_on(model: PreTrainedModel, config: PeftConfig) -> PeftModel | None:
    """The model with a fresh adapter that has no weights either; None where PEFT needs some to make it."""
    from peft import get_peft_model

    try:
        return get_peft_model(model, config, low_cpu_mem_usage=True)
    except UNFIT as error:
        raise TrainError(f"{section_of(config)}: {first_line(error)}") from error
    except RuntimeError:
        return None


def weightless_model(base: Path) -> PreTrainedModel | None:
    """The class that training loads, on the meta device; None where that is not to be had: loading says why."""
    from transformers import AutoConfig

    try:
        return weightless_of(AutoConfig.from_pretrained(str(base), trust_remote_code=False))
    except Exception:  # each model has its own
        return None


def weightless_of(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a config, on the meta device."""
    import torch

    with torch.device("meta"):
        return weightless_language_model(config)
