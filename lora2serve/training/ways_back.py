"""Which modules of a model lead back into its width: where IA3 scales, and behind which a bottleneck stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lora2serve.adapters.target_presets import QV
from lora2serve.training.lora_targets import attention_modules, expert_parameters, linear_modules, suffixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "kv_b_proj", "wk", "wv")
FUSED = tuple(name for name in QV if name not in ("q_proj", "v_proj"))  # query, key and value in one
INTO = (*KEYS_AND_VALUES, *FUSED, "q_proj", "query", "q_b_proj", "wq", "in_proj")  # of what mixes tokens


def back_projections(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Of linear layers beside the attention, the last one in each module, where it gives the model's width."""
    attention = set(attention_modules(model, paths))
    return _of_width(model, {path.rpartition(".")[0]: path for path in paths if path not in attention}.values())


def bottleneck_modules(model: PreTrainedModel, kind: str) -> list[str]:
    """Names of what leads out of the MLP of each layer; for ``houlsby`` also of what mixes tokens in it.

    Of a mixture of experts that is all of it.
    """
    paths = linear_modules(model)
    mixing = _mixing(model, paths)
    blocks = _expert_blocks(model)
    inside = tuple(f"{block}." for block in blocks)
    chosen = [*back_projections(model, [p for p in paths if p not in mixing and not p.startswith(inside)]), *blocks]
    if kind == "houlsby":
        mixed = [path for path in paths if path in mixing and not path.rsplit(".", 1)[-1].startswith(INTO)]
        chosen += {path.rpartition(".")[0]: path for path in _of_width(model, mixed)}.values()
    return suffixes(chosen, [name for name, _ in model.named_modules() if name])


def _expert_blocks(model: PreTrainedModel) -> list[str]:
    """The modules that hold experts and what chooses among them."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in expert_parameters(model))
    kinds = {path: type(model.get_submodule(path)).__name__ for path in owners}
    return list(
        dict.fromkeys(path.rpartition(".")[0] for path, kind in kinds.items() if "Expert" in kind or "Moe" in kind)
    )


def _mixing(model: PreTrainedModel, paths: Sequence[str]) -> set[str]:
    """Those of ``paths`` in an attention, or beside a convolution over the tokens."""
    from torch.nn import Conv1d

    owners = {path: model.get_submodule(path.rpartition(".")[0]) for path in paths}
    beside = [path for path, owner in owners.items() if any(isinstance(child, Conv1d) for child in owner.children())]
    return {*attention_modules(model, paths), *beside}


def _of_width(model: PreTrainedModel, paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that give the model's width."""
    width = model.get_input_embeddings().weight.shape[-1]
    modules = {path: model.get_submodule(path) for path in paths}
    return [path for path, each in modules.items() if getattr(each, "out_features", getattr(each, "nf", 0)) == width]
