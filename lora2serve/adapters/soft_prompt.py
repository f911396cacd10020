"""A soft prompt: N learned vectors that come in front of every row, as PEFT saves those of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora2serve.adapters.adapter import Adapter
from lora2serve.adapters.deltas import AdapterTensor
from lora2serve.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("PROMPT_TUNING", "P_TUNING", "CPT")  # p-tuning's encoder and CPT's deltas are in the vectors that are saved
TENSOR = "prompt_embeddings"
TOKEN = "<|soft_prompt_{}|>"


@dataclass(frozen=True)
class SoftPrompt:
    """The vectors, (N, width), as they come out of the embedding: what a model multiplies them by is done."""

    vectors: AdapterTensor

    @property
    def count(self) -> int:
        """N."""
        return self.vectors.shape[0]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of the special token that stands for each."""
        return tuple(TOKEN.format(number) for number in range(self.count))

    def read(self) -> Tensor:
        """(N, width) float32."""
        return self.vectors.read()


def soft_prompt_of(adapter: Adapter) -> SoftPrompt:
    """That of an adapter of one of ``KINDS``; AdapterError for a file with anything else in it."""
    specs = {spec.name: spec for spec in adapter.tensors.specs()}
    found = specs.pop(TENSOR, None)
    if found is None or len(found.shape) != 2:
        raise AdapterError(f"{adapter.path}: no {TENSOR} of two dimensions, as PEFT saves {adapter.method}")
    if specs:
        names = ", ".join(sorted(specs)[:3])
        raise AdapterError(
            f"{adapter.path}: {names} beside the soft prompt: no target holds both",
            "train the modules with a LoRA, or the soft prompt alone",
        )
    expected = adapter.config.get("num_virtual_tokens")
    if expected != found.shape[0]:
        raise AdapterError(f"{adapter.path}: num_virtual_tokens is {expected}, {TENSOR} has {found.shape[0]} rows")
    return SoftPrompt(AdapterTensor(adapter.tensors, TENSOR, found.shape))
