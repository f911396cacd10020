"""Which model classes take LoRA in the vLLM that is pinned: the table in ``vllm_support.json``.

``scripts/vllm_lora_classes.py`` makes it from vLLM's source; a test compares it with the installed vLLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("vllm_support.json")


@dataclass(frozen=True)
class LoraClass:
    """What one architecture takes: LoRA at all, and on which of embedding and head."""

    lora: bool
    embeddings: tuple[str, ...]


@cache
def lora_classes() -> dict[str, LoraClass]:
    """Every architecture that the engine has."""
    classes: dict[str, list[str] | None] = json.loads(TABLE.read_text(encoding="utf-8"))["classes"]
    return {name: LoraClass(modules is not None, tuple(modules or ())) for name, modules in classes.items()}


def lora_class(architecture: str) -> LoraClass | None:
    """The engine's class for an ``architectures`` entry; None where the engine has no such model."""
    return lora_classes().get(architecture)
