"""Bring the names an adapter was trained with and the names on disk together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora2serve.adapter import Change
from lora2serve.deltas import Delta
from lora2serve.errors import did_you_mean
from lora2serve.tensors import TensorSpec


class Names:
    """Where each change of an adapter lands in a checkpoint."""

    def __init__(self, specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._config = config

    def has(self, name: str) -> bool:
        return name in self._specs

    def find(self, change: Change) -> list[tuple[str, Delta]]:
        """(stored weight, delta) for one change: one, several for fused experts, none if nothing fits."""
        if change.parameter in self._specs:
            return [(change.parameter, change.delta)]
        return []

    def nearest(self, name: str) -> str:
        return did_you_mean(name, self._specs)
