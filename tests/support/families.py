"""Small random models of many families: whatever holds for any model is held for these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.support.tiny import SHAPE

GPT2: Mapping[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
LINEAR: Mapping[str, Any] = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2: Mapping[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}
EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW: Mapping[str, Any] = {"head_dim": 16, "sliding_window": 8}

FAMILIES: Mapping[str, Mapping[str, Any]] = {  # model_type -> what its config needs beside the shape of the others
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gemma4_text": {**WINDOW, "vocab_size_per_layer_input": 320},
    "phi": {},
    "phi3": {},
    "gpt2": GPT2,
    "gpt_neox": {},
    "gptj": {**GPT2, "rotary_dim": 8},
    "gpt_bigcode": GPT2,
    "stablelm": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "granite": {"logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4": {"head_dim": 16},
    "smollm3": {},
    "exaone4": {"sliding_window": 8},
    "nemotron": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    "qwen3_5_text": LINEAR,
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        **MAMBA2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 16,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "rwkv": {"attention_hidden_size": 64, "context_length": 128},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "head_dim": 16, "attention_window_size": 64},
    "falcon": {"multi_query": True, "alibi": False},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
}
HANDFUL = ("llama", "gemma3_text", "gpt_oss", "qwen3_5_text", "opt", "mamba2")  # of each kind of attention one


def make_family(model_type: str, **changes: Any) -> Any:
    """A model of that type in memory, float32, with weights large enough for every token to matter to the next."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **FAMILIES[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()
