"""What llama.cpp wants of each model family: names, row orders and metadata; one short entry a family.

Facts from llama.cpp's ``conversion`` package and ``src/models``; the common keys are in metadata.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora2serve.errors import ExportError, did_you_mean

Config = Mapping[str, Any]
Keys = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One family.

    ``permuted``: rows of q and k go from transformers' halves to llama.cpp's pairs. ``norm_shift``: norms are stored
    minus one. ``keys``: metadata beyond the common, without the ``{arch}.`` prefix. ``refuse``: a config value that
    llama.cpp's graph cannot express, in words.
    """

    name: str
    permuted: bool = False
    norm_shift: bool = False
    keys: Callable[[Config], Keys] = lambda config: {}
    refuse: Callable[[Config], str] = lambda config: ""
    needs_sentencepiece: bool = False
    add_space_prefix: bool | None = None
    drop: tuple[str, ...] = ()  # tensors that llama.cpp has no use for


def text_config(config: Config) -> Config:
    """The language model's part of a multimodal config."""
    part = config.get("text_config")
    return {**part, "architectures": config.get("architectures")} if part else config


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _llama(config: Config) -> Keys:
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim(config)}


def _granite(config: Config) -> Keys:
    scales = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    return _llama({**config, "head_dim": None}) | {
        key: float(config[name]) for key, name in scales.items() if config.get(name)
    }


def _gemma2(config: Config) -> Keys:
    return {
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        "attention.sliding_window": config["sliding_window"],
    }


def _gemma3(config: Config) -> Keys:
    keys: Keys = {
        "attention.key_length": config.get("head_dim", 256),
        "attention.value_length": config.get("head_dim", 256),
        "attention.sliding_window": config["sliding_window"],
    }
    if config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return keys


def _qwen2_moe(config: Config) -> Keys:
    return {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }


def _qwen3_moe(config: Config) -> Keys:
    return {"expert_feed_forward_length": config["moe_intermediate_size"]}


def _refuse_unnormalised(config: Config) -> str:
    if config.get("norm_topk_prob") is not True:
        return (
            f"norm_topk_prob is {config.get('norm_topk_prob')!r}; llama.cpp always normalises the expert weights here"
        )
    return ""


def _olmo2(config: Config) -> Keys:
    if not config.get("sliding_window"):
        return {}
    kinds = config.get("layer_types") or []
    return {
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
    }


LLAMA = Architecture("llama", permuted=True, keys=_llama)
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MixtralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe", keys=_qwen2_moe),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", keys=_qwen3_moe, refuse=_refuse_unnormalised),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        norm_shift=True,
        keys=_gemma2,
        needs_sentencepiece=True,
        add_space_prefix=False,
        drop=("lm_head.weight",),
    ),
    "Gemma3ForCausalLM": Architecture("gemma3", norm_shift=True, keys=_gemma3, add_space_prefix=False),
    "SmolLM3ForCausalLM": Architecture("smollm3", permuted=True, keys=_llama),
    "GraniteForCausalLM": Architecture("granite", permuted=True, keys=_granite),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2", keys=_olmo2),
}


def find(config: Config) -> Architecture:
    """The family of a config; ExportError for what is not known here, or not expressible there."""
    name = (config.get("architectures") or ["none"])[0]
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ExportError(
            f"architecture {name}: no GGUF conversion{did_you_mean(name, ARCHITECTURES)}",
            f"known: {', '.join(sorted(ARCHITECTURES))}",
        )
    reason = architecture.refuse(config)
    if reason:
        raise ExportError(f"architecture {name}: {reason}", "serve it with --target vllm")
    return architecture
