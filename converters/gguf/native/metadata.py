"""The metadata keys of a GGUF file, apart from the vocabulary.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; values as llama.cpp's converter writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.gguf.header import GgufValue
from converters.gguf.native import vocab
from converters.gguf.native.architectures import Architecture, Config, head_dim
from lora2serve.config.yaml_text import front_matter
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel

Values = dict[str, GgufValue]
Sizes = tuple[int, int, int, int]  # parameters: all, outside the experts, of one expert; number of experts
ROPE_SCALING = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}


def architecture_keys(config: Config, architecture: Architecture) -> Values:
    """``{arch}.*``: what the graph needs to know."""
    keys: dict[str, GgufValue | None] = {"block_count": config["num_hidden_layers"]}
    plain = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
    }
    keys |= {key: config[name] for key, name in plain.items() if config.get(name) is not None}
    keys |= _rope(config)
    if config.get("rms_norm_eps") is not None:
        keys["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        keys["expert_count"] = experts
        keys["expert_used_count"] = config["num_experts_per_tok"]
    if config.get("head_dim") is not None:
        keys["attention.key_length"] = keys["attention.value_length"] = config["head_dim"]
    keys |= architecture.keys(config)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and not architecture.sliding:  # the graph attends to everything: right as long as that is the window
        keys["context_length"] = min(config["max_position_embeddings"], window)
    return {f"{architecture.name}.{key}": value for key, value in keys.items() if value is not None}


def general_keys(model: ExportModel, architecture: Architecture, file_type: int, sizes: Sizes) -> Values:
    """``general.*``, and where the file came from."""
    from gguf import GGML_QUANT_VERSION, size_label

    return {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": vocab.name_for_llama_cpp(model),
        "general.size_label": size_label(*sizes),
        "general.file_type": file_type,
        "general.quantization_version": GGML_QUANT_VERSION,
        **_sampling(model),
        **_card(model),
        **lineage_keys(model),
    }


def lineage_keys(model: ExportModel) -> Values:
    """The base, and where the file came from."""
    keys: Values = {}
    base, lineage = model.base, model.lineage
    if base and not base.startswith(("/", ".")):
        organization, _, name = base.rpartition("/")
        keys = {
            "general.base_model.count": 1,
            "general.base_model.0.name": name,
            "general.base_model.0.organization": organization or name,
            "general.base_model.0.repo_url": f"https://huggingface.co/{base}",
        }
    if lineage.merge_base:
        keys["lora2serve.merge_base"] = lineage.merge_base
    if lineage.run:
        keys["lora2serve.run"] = lineage.run
    return keys


def rope_factor_tensors(config: Config) -> dict[str, list[float]]:
    """Rope factors that llama.cpp reads as tensors: Llama 3's, and the two sets of longrope (Phi-3)."""
    rope = _rope_parameters(config)
    factors = rope_factors(config)
    tensors = {"rope_freqs.weight": factors} if factors else {}
    if rope.get("long_factor"):
        tensors["rope_factors_long.weight"] = list(rope["long_factor"])
        tensors["rope_factors_short.weight"] = list(rope["short_factor"])
    return tensors


def rope_factors(config: Config) -> list[float] | None:
    """``rope_freqs.weight`` of Llama 3's rope scaling: one divisor for each pair of a head (Llama 3.1's own rule)."""
    rope = _rope_parameters(config)
    if str(rope.get("rope_type", "")).lower() != "llama3":
        return None
    dim, base = head_dim(config), float(rope.get("rope_theta", 10000.0))
    factor = rope.get("factor", 8.0)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope.get("original_max_position_embeddings", 8192)
    import torch

    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    factors = []
    for freq in freqs:  # float32 throughout, as there
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(float(factor))
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return factors


def _rope_parameters(config: Config) -> Config:
    """Rope settings under the names of either generation of transformers."""
    settings: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = settings.get("full_attention", settings)
    rope_type = settings.get("rope_type") or settings.get("type")
    theta = settings.get("rope_theta", config.get("rope_theta"))
    return {**settings, **({"rope_type": rope_type} if rope_type else {}), **({"rope_theta": theta} if theta else {})}


def _rope(config: Config) -> Values:
    rope = _rope_parameters(config)
    keys: Values = {}
    kind = str(rope.get("rope_type") or "default").lower()
    if kind in ROPE_SCALING:
        keys["rope.scaling.type"] = ROPE_SCALING[kind]
        if kind in ("linear", "yarn"):
            keys["rope.scaling.factor"] = float(rope["factor"])
        if kind == "yarn":
            keys |= _yarn(rope)
    elif kind not in ("default", "llama3"):
        raise ExportError(f"rope type {kind!r}: llama.cpp has no such scaling", "serve it with --target vllm")
    if rope.get("rope_theta"):
        keys["rope.freq_base"] = float(rope["rope_theta"])
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta") or config.get(
        "rope_local_base_freq"
    )
    if local:
        keys["rope.freq_base_swa"] = float(local)
    return keys


def _yarn(rope: Config) -> Values:
    numbers = (
        ("rope.scaling.yarn_attn_factor", "attention_factor"),
        ("rope.scaling.yarn_ext_factor", "extrapolation_factor"),
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    )
    return {
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        **{key: float(rope[name]) for key, name in numbers if rope.get(name) is not None},
    }


def _card(model: ExportModel) -> Values:
    """License, tags and languages from the head of the base's model card."""
    path = model.lineage.base.path
    readme = Path(path) / "README.md" if path else None
    if readme is None or not readme.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        text = readme.read_text(encoding="utf-8-sig")
        front_matter(text)  # within bounds
        card: Any = ModelCard(text, ignore_metadata_errors=True)
    except ValueError:  # someone else's card: what cannot be read tells nothing
        return {}
    data: Mapping[str, object] = card.data.to_dict()
    names = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    keys: Values = {names[name]: value for name in names if isinstance(value := data.get(name), str)}
    tags = [*_list(data.get("tags")), *_list(data.get("pipeline_tag"))]
    keys |= {"tags": tags} if tags else {}
    keys |= {"languages": _list(data["language"])} if data.get("language") else {}
    return {f"general.{key}": value for key, value in keys.items()}


def _list(value: object) -> list[str]:
    return [str(part) for part in value] if isinstance(value, list) else [str(value)] if value else []


def _sampling(model: ExportModel) -> Values:
    """Sampling defaults of generation_config.json, which llama.cpp's tools take over."""
    path = model.files.get("generation_config.json")
    generation: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8")) if path else {}
    kinds: dict[str, tuple[str, type[int] | type[float]]] = {
        "temperature": ("temp", float),
        "top_p": ("top_p", float),
        "top_k": ("top_k", int),
        "min_p": ("min_p", float),
        "repetition_penalty": ("penalty_repeat", float),
    }
    return {
        f"general.sampling.{name}": kind(value)
        for key, (name, kind) in kinds.items()
        if isinstance(value := generation.get(key), int | float)
    }
