"""The shapes of published models, as their config.json says them: what a plan needs of one, and nothing of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

Shape = Mapping[str, object]

LLAMA: Shape = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3: Shape = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False}
SHAPES: Mapping[str, Shape] = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "meta-llama/Llama-3.3-70B-Instruct": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Qwen/Qwen3-8B": {
        **QWEN3, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Qwen/Qwen3-30B-A3B": {
        **QWEN3, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "norm_topk_prob": True,
    },
    "google/gemma-3-12b-it": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
            "vocab_size": 262208, "max_position_embeddings": 131072,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 896,
        },
    },
    "mistralai/Mistral-Small-24B-Instruct-2501": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 5120,
        "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "microsoft/phi-4": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 17920,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352,
        "max_position_embeddings": 16384, "tie_word_embeddings": False,
        "bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100349,
    },
    "unsloth/gpt-oss-20b-BF16": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
}  # fmt: skip


WITH_HEADERS = ("gemma3", "qwen3_moe", "gpt_oss")  # a second tower, or experts: their config.json alone is not enough


def write_shape(folder: Path, model: str) -> Path:
    """A model directory with the config of that shape, and where a plan needs them the headers of bfloat16 weights.

    The weights themselves are a hole in a sparse file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[model]
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    if shape["model_type"] in WITH_HEADERS:
        _write_headers(folder)
    return folder


def _write_headers(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    offset, header = 0, {}
    for name, parameter in model.named_parameters():  # tied ones once
        count = 2 * parameter.numel()
        header[name] = {
            "dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, offset + count],
        }  # fmt: skip
        offset += count
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
