"""How the merged weights of a vLLM directory are stored: one protocol for 16 bits, compressed and calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from converters.safetensors import ShardWriter
from lora2serve.artifacts.staging import StagedDir
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import Block, TensorSpec


@dataclass(frozen=True)
class WrittenWeights:
    """What the rest of the directory must say of the weights."""

    quantization_config: JsonObject | None = None  # for config.json
    facts: JsonObject = field(default_factory=dict)  # for the manifest


class WeightWriter(Protocol):
    """Planned and refused in the constructor, then filled block by block; see ``lora2serve.exporting.sinks.Sink``."""

    @property
    def wanted(self) -> Mapping[str, int]:
        """As a sink's."""
        ...

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        """Take rows of one merged tensor."""
        ...

    def finish(self, config: JsonObject) -> WrittenWeights:
        """Complete the weights; ``config`` is the merged model's, as it would be served in 16 bits."""
        ...

    def close(self) -> None:
        """Release handles. Safe twice."""
        ...


class PlainWriter:
    """Every tensor in its own type."""

    def __init__(self, out: StagedDir, specs: Sequence[TensorSpec], shard: int) -> None:
        self.wanted: Mapping[str, int] = {spec.name: 1 for spec in specs}
        self._shards = ShardWriter(out, specs, shard)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        self._shards.write(spec.name, rows, block)

    def finish(self, config: JsonObject) -> WrittenWeights:
        return WrittenWeights()

    def close(self) -> None:
        """Nothing is held open but the output's own files."""
