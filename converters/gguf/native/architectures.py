"""What llama.cpp wants of each model family: names, row orders and metadata; one short entry a family.

Facts from llama.cpp's ``conversion`` package and ``src/models``; the common keys are in metadata.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.gguf.header import GgufValue
from lora2serve.errors import ExportError, did_you_mean

Config = Mapping[str, Any]  # a config.json
Values = dict[str, GgufValue | None]  # None takes a common key out


@dataclass(frozen=True)
class Architecture:
    """One family.

    ``permuted``: rows of q and k go from transformers' halves to llama.cpp's pairs. ``norm_shift``: norms are stored
    minus one. ``keys``: metadata beyond the common, without the ``{arch}.`` prefix. ``refuse``: a config value that
    llama.cpp's graph cannot express, in words. ``sliding``: its graph has the sliding window, if the model has one.
    ``fused_experts``: stacked experts, their input axis first (gpt-oss).
    """

    name: str
    permuted: bool = False
    norm_shift: bool = False
    keys: Callable[[Config], Values] = lambda config: {}
    refuse: Callable[[Config], str] = lambda config: ""
    needs_sentencepiece: bool = False
    add_space_prefix: bool | None = None
    sliding: bool = False
    fused_experts: bool = False
    drop: tuple[str, ...] = ()  # tensors that llama.cpp has no use for


def text_config(config: Config) -> Config:
    """The language model's part of a multimodal config."""
    part = config.get("text_config")
    return {**part, "architectures": config.get("architectures")} if part else config


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _llama(config: Config) -> Values:
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim(config)}


def _granite(config: Config) -> Values:
    scales = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    return _llama({**config, "head_dim": None}) | {
        key: float(config[name]) for key, name in scales.items() if config.get(name)
    }


def _gemma2(config: Config) -> Values:
    return {
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        "attention.sliding_window": config["sliding_window"],
    }


def _gemma3(config: Config) -> Values:
    keys: Values = {
        "attention.key_length": config.get("head_dim", 256),
        "attention.value_length": config.get("head_dim", 256),
        "attention.sliding_window": config["sliding_window"],
    }
    if config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return keys


def _qwen2_moe(config: Config) -> Values:
    return {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }


def _qwen3_moe(config: Config) -> Values:
    return {"expert_feed_forward_length": config["moe_intermediate_size"]}


def _refuse_unnormalized(config: Config) -> str:
    if config.get("norm_topk_prob") is not True:
        return (
            f"norm_topk_prob is {config.get('norm_topk_prob')!r}; llama.cpp always normalizes the expert weights here"
        )
    return ""


def _phi3(config: Config) -> Values:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    context = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or context
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    keys: Values = {
        "rope.scaling.type": None,  # llama.cpp takes the factors from the two tensors
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": int(share * config["hidden_size"]) // config["num_attention_heads"],
        "attention.sliding_window": config.get("sliding_window") or 0,  # 0 tells Phi-4 from Phi-3
        "attention.key_length": None,
        "attention.value_length": None,
    }
    if rope.get("long_factor"):
        scale = context / original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return keys


def _refuse_phi3(config: Config) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "longrope", "su"):
        return f"rope type {kind!r}; llama.cpp's graph of Phi-3 has only longrope"
    return ""


def _mistral3(config: Config) -> Values:
    rope = config.get("rope_parameters") or {}
    return _llama(config) | {
        "rope.scaling.yarn_log_multiplier": float(rope["mscale_all_dim"]),
        "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
    }


def _refuse_mistral3(config: Config) -> str:
    rope = config.get("rope_parameters") or {}
    missing = [name for name in ("mscale_all_dim", "llama_4_scaling_beta") if rope.get(name) is None]
    if rope.get("rope_type") != "yarn" or missing:
        return f"rope_parameters {rope.get('rope_type')!r} without {', '.join(missing) or 'yarn'}"
    return ""


def _gpt_oss(config: Config) -> Values:
    return {
        "attention.sliding_window": config["sliding_window"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def _olmo2(config: Config) -> Values:
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
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", keys=_qwen3_moe, refuse=_refuse_unnormalized),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        norm_shift=True,
        keys=_gemma2,
        needs_sentencepiece=True,
        add_space_prefix=False,
        sliding=True,
        drop=("lm_head.weight",),
    ),
    "Gemma3ForCausalLM": Architecture("gemma3", norm_shift=True, keys=_gemma3, add_space_prefix=False, sliding=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", permuted=True, keys=_llama),
    "GraniteForCausalLM": Architecture("granite", permuted=True, keys=_granite),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2", keys=_olmo2, sliding=True),
    "Phi3ForCausalLM": Architecture("phi3", keys=_phi3, refuse=_refuse_phi3, sliding=True),
    "Ministral3ForCausalLM": Architecture("mistral3", permuted=True, keys=_mistral3, refuse=_refuse_mistral3),
    "GptOssForCausalLM": Architecture("gpt-oss", keys=_gpt_oss, sliding=True, fused_experts=True),
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
