"""Names that training wrapped: torch.compile, FSDP, checkpointing and DDP write themselves into a model's keys.

None of them is a part of the model: the same adapter, saved without them, has the plain names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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


def unwrap_names(names: object) -> object:
    """A list of names, or a table by them, with every name plain; anything else (token ids, too) as it is."""
    if isinstance(names, Mapping):
        return {plain_name(str(name)): value for name, value in names.items()}
    return [plain_name(name) if isinstance(name, str) else name for name in names] if isinstance(names, list) else names
