"""Names that training wrapped: torch.compile, FSDP, checkpointing and DDP write themselves into a model's keys.

None of them is a part of the model: the same adapter, saved without them, has the plain names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora2serve.errors import AdapterError, raise_all
from lora2serve.weights.checkpoint import StoredTensor

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
DDP = re.compile(r"^(base_model\.model\.)?module\.(?=\w)")
NAMES_OF_CONFIG = (
    "target_modules", "modules_to_save", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern",
    "trainable_token_indices",
)  # fmt: skip


def plain_name(name: str) -> str:
    """The name without wrappers."""
    return DDP.sub(r"\1", WRAPPERS.sub("", DDP.sub(r"\1", name)))


def unwrap_tensors(path: Path, stored: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The tensors by their plain names; AdapterError for two that become one."""
    plain = [replace(item, spec=replace(item.spec, name=plain_name(item.spec.name))) for item in stored]
    twice = [name for name, count in Counter(item.spec.name for item in plain).items() if count > 1]
    raise_all([f"{path}: {name}: there with a wrapper's prefix and without" for name in twice], AdapterError)
    return plain


def unwrap_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config whose lists and patterns of names are plain."""
    return {**config, **{key: _plain(config[key]) for key in NAMES_OF_CONFIG if _is_wrapped(config.get(key))}}


def _plain(names: Any) -> Any:
    if isinstance(names, Mapping):
        return {plain_name(name): value for name, value in names.items()}
    return [plain_name(name) for name in names]


def _is_wrapped(names: Any) -> bool:
    """Whether it is a list or a table of names, with a wrapper in any of them."""
    return isinstance(names, list | Mapping) and any(
        isinstance(name, str) and plain_name(name) != name for name in names
    )
