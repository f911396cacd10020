"""Llama-shaped models of any size with random weights, and an adapter, written without holding them in memory.

python -m benchmarks.models DIR LAYERS     DIR/base, DIR/adapter
python -m benchmarks.models --nf4 DIR      DIR/nf4 from DIR/base, by transformers and bitsandbytes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY, RANK = 2048, 5632, 32, 4, 32000, 16
KV = HIDDEN // HEADS * KV_HEADS
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}  # fmt: skip


def config(layers: int) -> dict[str, Any]:
    """``config.json`` of such a model: 22 layers make 1.1B parameters."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "hidden_act": "silu",
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()}
        found |= {f"{prefix}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(root: Path, layers: int) -> None:
    """Base and adapter (rank 16 on all linears, B random), one tensor in memory at a time."""
    _write(root / "base", "model.safetensors", shapes(layers), "BF16", 0.02)
    (root / "base" / "config.json").write_text(json.dumps(config(layers)))
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name, (out, into) in LINEARS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{module}.lora_A.weight": (RANK, into), f"{module}.lora_B.weight": (out, RANK)}
    _write(root / "adapter", "adapter_model.safetensors", tensors, "F32", 0.02)
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none",
        "base_model_name_or_path": str(root / "base"), "target_modules": sorted(n.split(".")[1] for n in LINEARS),
    }  # fmt: skip
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))


def make_nf4(root: Path) -> None:
    """The base as bitsandbytes packs it: nf4, double quantization."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    chosen = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(root / "base", quantization_config=chosen, dtype=torch.bfloat16)
    model.save_pretrained(root / "nf4")


def _write(path: Path, name: str, tensors: dict[str, tuple[int, ...]], dtype: Any, std: float) -> None:
    import torch

    from converters.safetensors import as_bytes, encode_header
    from lora2serve.weights.tensors import TensorSpec, torch_dtype

    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with (path / name).open("wb") as file:
        file.write(encode_header([TensorSpec(tensor, shape, dtype) for tensor, shape in tensors.items()]))
        for shape in tensors.values():
            values = torch.randn(shape, generator=generator).mul_(std) if len(shape) > 1 else torch.ones(shape)
            file.write(as_bytes(values.to(torch_dtype(dtype))))


if __name__ == "__main__":
    if sys.argv[1] == "--nf4":
        make_nf4(Path(sys.argv[2]))
    else:
        make(Path(sys.argv[1]), int(sys.argv[2]))
