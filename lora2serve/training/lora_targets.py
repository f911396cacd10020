"""Which modules of a model get a LoRA: the presets of a recipe, or names, looked up in the model itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora2serve.adapters.target_presets import OTHER_TOWERS, in_other_tower, named, preset_modules
from lora2serve.config.recipe import EXPERTS
from lora2serve.errors import TrainError, did_you_mean

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

READ_PAST = ("out_proj", "dt_proj")  # of a state space: its weight goes to a kernel, or PEFT refuses it


def refuse_unknown(key: str, names: Sequence[str], paths: Sequence[str]) -> None:
    unknown = [name for name in names if not named(paths, [name])]
    if unknown:
        leaves = sorted({leaf for path in paths if (leaf := path.rsplit(".", 1)[-1]) and not leaf.isdigit()})
        near = did_you_mean(unknown[0], leaves)
        raise TrainError(
            f"{key}: no module {', '.join(map(repr, unknown))} in this model{near}", f"it has: {', '.join(leaves)}"
        )


def targets(model: PreTrainedModel, preset: str | Sequence[str], key: str = "train.lora.targets") -> list[str]:
    """Module names: a preset's, looked up in the real model, or those of the recipe, once each is known to be there.

    key: of the recipe, for messages.
    """
    if not isinstance(preset, str):
        refuse_unknown(key, preset, _adaptable(model))
        _refuse_head(model, preset, key)
        return list(preset)
    towers = re.compile(other_towers(model) or r"(?!)")  # excluded by name, and with other names than layers have
    paths = [path for path in linear_modules(model) if not towers.fullmatch(path)]
    chosen = preset_modules(preset, paths, attention_modules(model, paths))
    if not chosen:
        leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
        raise TrainError(f"{key}: preset {preset} finds no module in this model", f"name them: {', '.join(leaves)}")
    return suffixes(chosen, paths)


def attention_modules(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` whose owner is of a class of attention."""
    return [path for path in paths if "Attention" in type(_owner(model, path)).__name__]


def _refuse_head(model: PreTrainedModel, names: Sequence[str], key: str) -> None:
    """TRL takes the loss from the weight of the head: a LoRA beside it would never be trained."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head and named([path], names):
            adapter, section = ("LoRA", "lora") if key.startswith("train.lora") else ("adapter", "options")
            raise TrainError(
                f"{key}: {path} is the head of this model, which takes no {adapter} in training",
                f"name it in train.{section}.modules_to_save, which trains it in full, or leave it out",
            )


def suffixes(chosen: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The shortest endings that name the chosen modules and no other: GPT-2 has two kinds of ``c_proj``."""
    others = set(paths) - set(chosen)
    suffixes = set()
    for path in chosen:
        parts = path.split(".")
        endings = (".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1))
        suffixes.add(next(end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(suffixes)


def _adaptable(model: PreTrainedModel) -> list[str]:
    """Dotted names of every module that can carry a LoRA, head and embeddings too."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = torch.nn.Linear | torch.nn.Embedding | Conv1D
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Dotted names of the linear layers, without the head, routers of experts, and what no LoRA would reach."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and not name.endswith((".gate", ".router"))
        and not (name.endswith(READ_PAST) and _is_state_space(_owner(model, name)))
    ]


def expert_parameters(model: PreTrainedModel) -> dict[str, int]:
    """The weights that hold all experts of a layer, and how many values are in each.

    They are no linear layers. Of the towers that see and hear there are none.
    """
    from lora2serve.training.expert_layers import four_bit_modules, four_bit_of

    towers = re.compile(other_towers(model) or r"(?!)")
    owners = dict(model.named_modules())
    states = ((path, four_bit_of(module).states) for path, module in four_bit_modules(model))
    packed = {f"{path}.{name}": state.shape.numel() for path, own in states for name, state in own.items()}
    whole = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in f"{name} {type(owners[name.rpartition('.')[0]]).__name__}".lower()
    }
    return {name: size for name, size in {**packed, **whole}.items() if not towers.fullmatch(name)}


def target_parameters(model: PreTrainedModel, wanted: str | Sequence[str]) -> list[str] | None:
    """Of the experts' weights, by ending, those that a recipe names; None where it names none."""
    key, paths = "train.lora.target_parameters", expert_parameters(model)
    endings = sorted({".".join(path.split(".")[-2:]) for path in paths})
    if not wanted:
        return None
    if not paths:
        raise TrainError(f"{key}: this model has no experts in one tensor a layer", "leave it out")
    if wanted == EXPERTS:
        return endings
    unknown = [name for name in wanted if not named(list(paths), [name])]
    if unknown:
        near = did_you_mean(unknown[0], endings)
        raise TrainError(f"{key}: no weight {', '.join(map(repr, unknown))} of experts in this model{near}",
                         f"{EXPERTS}, or of {', '.join(endings)}")  # fmt: skip
    return list(wanted)


def _owner(model: PreTrainedModel, path: str) -> Module:
    """The module that one stands in."""
    owner: Module = model.get_submodule(path.rpartition(".")[0])
    return owner


def _is_state_space(module: Module) -> bool:
    """Whether it is a Mamba layer of any model: decay A and skip D are its parameters."""
    return hasattr(module, "A_log") and hasattr(module, "D")


def other_towers(model: PreTrainedModel) -> str | None:
    """A pattern for the modules that do not belong to the language model of a multimodal one."""
    towers = any(map(in_other_tower, linear_modules(model)))
    return rf".*({'|'.join(OTHER_TOWERS)}).*" if towers else None
