"""The model without its weights: what the recipe's adapter needs of it is met before gigabytes are read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.adapters.target_presets import named
from lora2serve.config.recipe import TrainRecipe
from lora2serve.errors import TrainError, first_line
from lora2serve.training.lora_targets import linear_modules
from lora2serve.training.model import Device, lora_config
from lora2serve.weights.checkpoint import read_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def check_adapter(base: Path, recipe: TrainRecipe, device: Device) -> list[str]:
    """Warnings of what the model of ``base`` leaves out; TrainError for an adapter that it cannot carry."""
    model = weightless_model(base)
    if model is None:
        return []
    config = lora_config(model, recipe)
    experts = _experts(model)
    wanted = {*named(linear_modules(model), list(config.target_modules)), *experts}
    warnings = []
    if left_out := wanted - (_adapted(model, config) or wanted):
        names = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in sorted(left_out)))
        warnings.append(f"no LoRA on {names}: of a mixture of experts PEFT adapts either these or the others")
    if experts and recipe.quantize != "none" and not read_config(base).get("quantization_config"):
        size = sum(experts.values()) * (4 if device.dtype == "float32" else 2) / 1e9
        warnings.append(
            f"train.quantize: {recipe.quantize} leaves {size:.1f} GB of experts in {device.dtype}: "
            "bitsandbytes quantizes linear layers"
        )
    return warnings


def _adapted(model: PreTrainedModel, config: LoraConfig) -> set[str] | None:
    """The modules and parameters that get a LoRA: PEFT takes names of experts for the tensor that holds them all.

    None where PEFT needs weights to say.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    try:
        adapted = get_peft_model(
            model, replace(config, init_lora_weights=False, use_dora=False), low_cpu_mem_usage=True
        )
    except ValueError as error:
        raise TrainError(f"train.lora: {first_line(error)}") from error
    except (NotImplementedError, RuntimeError):
        return None
    found = set()
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            owner = re.sub(r"(\.base_layer)+$", "", name)
            found.add(f"{owner}.{module.parameter_name}")
        elif isinstance(module, LoraLayer):
            found.add(name)
    return found


def weightless_model(base: Path) -> PreTrainedModel | None:
    """The class that training loads, on the meta device; None where that is not to be had: loading says why."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # each model has its own
        return None


def _experts(model: PreTrainedModel) -> dict[str, int]:
    """The tensors that hold all experts of a layer, which are no linear layers, and how many values are in each."""
    from torch.nn import Conv1d, Conv2d, Conv3d

    owners = dict(model.named_modules())
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and not isinstance(owners[name.rpartition(".")[0]], Conv1d | Conv2d | Conv3d)
    }
