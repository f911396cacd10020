"""Mixtures of experts of Qwen3's kind whose weights are holes in a sparse file: 61 GB that take no room on a disk.

Bytes and seconds of a training are those of any weights; its losses say nothing: zeros guess, and learn nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

# config.json of Qwen/Qwen3-30B-A3B; and a small one with all of its parts
EXPERTS: dict[str, Mapping[str, int]] = {
    "30B-A3B": {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936,
    },
    "tiny experts": {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 1536,
    },
}  # fmt: skip


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor, by the names of published checkpoints: each expert by itself."""
    shape = EXPERTS[size]
    hidden, head = shape["hidden_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, out in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (out, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.mlp.gate.weight", (shape["num_experts"], hidden)
        for expert in range(shape["num_experts"]):
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}.mlp.experts.{expert}.{name}.weight", (shape["moe_intermediate_size"], hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, shape["moe_intermediate_size"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape["vocab_size"], hidden)


def parameters(size: str) -> int:
    """Values that a token meets: its experts of all."""
    shape = EXPERTS[size]
    whole = sum(rows * (rest[0] if rest else 1) for _, (rows, *rest) in shapes(size))
    expert = 3 * shape["hidden_size"] * shape["moe_intermediate_size"]
    return whole - shape["num_hidden_layers"] * (shape["num_experts"] - shape["num_experts_per_tok"]) * expert


def write(path: Path, size: str) -> None:
    """``config.json`` and ``model.safetensors`` in bfloat16; all zeros."""
    from converters.safetensors import encode_header
    from lora2serve.weights.tensors import TensorSpec

    path.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", **EXPERTS[size],
        "norm_topk_prob": True, "max_position_embeddings": 2048, "tie_word_embeddings": False, "eos_token_id": 0,
    }  # fmt: skip
    specs = [TensorSpec(name, shape, "BF16") for name, shape in shapes(size)]
    header = encode_header(specs)
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
