"""Small real models and adapters. B is random: PEFT starts it at zero, so a fresh adapter proves nothing."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LOADED_BYTES = 4 << 20  # a larger model is not kept
KEPT = 16
PLAIN = (bool, int, float, str, type, type(None), torch.dtype, torch.device)


def make_model(
    path: Path,
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "5GB",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a random model of that ``model_type`` (llama, qwen2, gemma2, mixtral, qwen3_moe, gpt2, ...)."""
    asked = repr((kind, dtype, shard, seed, sorted(changes.items())))
    if made := _made.get(asked):
        path.mkdir(parents=True, exist_ok=True)
        for name, content in made.files.items():
            (path / name).write_bytes(content)
        torch.set_rng_state(made.random)
        return path
    _make_model(path, kind, dtype, shard, seed, changes)
    if sum(file.stat().st_size for file in path.iterdir()) <= LOADED_BYTES:
        _made[asked] = _Made({file.name: file.read_bytes() for file in path.iterdir()}, torch.get_rng_state())
        if len(_made) > KEPT:
            _made.pop(next(iter(_made)))
    return path


def _make_model(path: Path, kind: str, dtype: torch.dtype, shard: str, seed: int, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(path, max_shard_size=shard)


@dataclass(frozen=True)
class _Made:
    """A model's files, and torch's random state behind its making: what comes next is the same when they are kept."""

    files: dict[str, bytes]
    random: torch.Tensor


_made: dict[str, _Made] = {}


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the CPU, float32 unless told otherwise."""
    kept = _kept(path, dtype)
    if kept is None:
        return _load(path, dtype)
    model = copied(kept, {})
    model.config.name_or_path = model.name_or_path = str(path)
    return model


def model_state(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Its tensors, to look at: nobody writes to them."""
    model = _kept(path, dtype)
    return dict((_load(path, dtype) if model is None else model).state_dict())


def _kept(path: Path, dtype: torch.dtype) -> Any:
    """The model as whoever asks next gets it, too; None for one that is too large to keep."""
    files = sorted(file for file in path.iterdir() if file.is_file())
    if sum(file.stat().st_size for file in files) > LOADED_BYTES:
        return None
    content = hashlib.blake2b()
    for file in files:
        content.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return _loaded(_Folder(content.digest(), path), dtype)


def copied(module: torch.nn.Module, memo: dict[int, Any]) -> Any:
    """As ``copy.deepcopy`` does, in half the time: of what a module holds, most is plain or empty."""
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = other = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        if name == "_modules":
            held: Any = {key: None if child is None else copied(child, memo) for key, child in value.items()}
        elif type(value) in (dict, OrderedDict) and not value:
            held = type(value)()
        else:
            held = value if isinstance(value, PLAIN) else copy.deepcopy(value, memo)
        other.__dict__[name] = held
    return other


def _load(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with unlogged():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def unlogged() -> Any:
    """transformers writes out each config that it reads, for a log of a level that is off: a tenth of a loading."""
    from transformers import PreTrainedConfig

    return patch.object(PreTrainedConfig, "__repr__", object.__repr__)


@dataclass(frozen=True)
class _Folder:
    content: bytes
    path: Path = field(compare=False)


@lru_cache(maxsize=KEPT)
def _loaded(folder: _Folder, dtype: torch.dtype) -> Any:
    """Copied for each test: a copy takes a tenth of the time, and many tests share a base."""
    with torch.random.fork_rng(devices=[]):  # what comes next is as random as after a copy
        return _load(folder.path, dtype)


def make_adapter(
    path: Path,
    base: Path,
    *,
    seed: int = 1,
    method: str = "LORA",
    resize: int | None = None,
    std: float = 0.05,
    **config: Any,
) -> Path:
    """Save a PEFT adapter for ``base`` whose every tensor is random, as after a training."""
    from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model

    torch.manual_seed(seed)
    model = load_model(base)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    if method == "LORA":
        config = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    chosen: PeftConfig = get_peft_config({"peft_type": method, "task_type": "CAUSAL_LM", **config})
    chosen.base_model_name_or_path = str(base)
    adapted = get_peft_model(model, chosen)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    # no test reads its card, and that takes the longest
    with unlogged(), patch.object(PeftModel, "create_or_update_model_card", lambda *_: None):
        adapted.save_pretrained(path)
    return path


def make_imatrix(path: Path, base: Path, seed: int = 0) -> Path:
    """Weights for the columns such as no data would give: a few count a hundred times as much as the rest."""
    import numpy as np

    from converters.gguf import backends, imatrix
    from converters.gguf.gguf_layout import LayoutOptions
    from lora2serve.exporting.open_model import OpenOptions, open_plain

    (backend,) = backends.open_backends(open_plain(base, "base", OpenOptions()), LayoutOptions())
    generator = np.random.default_rng(seed)
    sums = {
        tensor.name: generator.lognormal(0, 1.5, (1, tensor.shape[-1])).astype(np.float32)
        for tensor in backend.tensors
        if len(tensor.shape) == 2
    }
    imatrix.write(path, sums, {name: np.ones(1, np.float32) for name in sums}, "data", 512)
    return path


def merged_by_peft(base: Path, *adapters: Path, resize: int | None = None) -> dict[str, torch.Tensor]:
    """The oracle: PEFT's own ``merge_and_unload`` in float32, as a state dict."""
    from peft import PeftModel

    model = load_model(base)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return dict(model.state_dict())
