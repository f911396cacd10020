"""Row blocks of plain weights in, row blocks of what compressed-tensors stores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from converters.safetensors import ShardWriter
from converters.vllm.compressed.quantize import global_factor, quantize
from converters.vllm.compressed.schemes import SCHEMES
from converters.vllm.compressed.selection import select
from converters.vllm.compressed.spool import Spool
from converters.vllm.weight_writer import WrittenWeights
from lora2serve.artifacts.staging import StagedDir
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import Block, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class CompressedWriter:
    """One scheme on one model.

    A scale needs the rows it spans, no more, and ``wanted`` says how many. Only nvfp4 has a scale over whole tensors,
    and one over all that vLLM fuses (q, k and v; gate and up): its blocks wait on the disk, as they came, until the
    last one of them is in. So each weight is still read and folded once, and memory stays a few blocks.
    """

    def __init__(self, quant: str, specs: Sequence[TensorSpec], config: JsonObject, out: StagedDir, shard: int) -> None:
        self._selection = select(specs, config, SCHEMES[quant])
        self.scheme, weights = self._selection.scheme, self._selection.weights
        self._tensors = {name: self.scheme.tensors(spec) for name, spec in weights.items()}
        self.wanted: Mapping[str, int] = {spec.name: self.scheme.rows if spec.name in weights else 1 for spec in specs}
        self._spool = Spool(self._selection.fused, weights, out.path) if self.scheme.shared else None
        stored = [self._tensors[spec.name].values() if spec.name in weights else [spec] for spec in specs]
        self._shards = ShardWriter(out, [spec for group in stored for spec in group], shard)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        if spec.name not in self._tensors:
            self._shards.write(spec.name, rows, block)
        elif self._spool is None:
            self._write_rows(spec.name, rows, block.values, None)
        elif complete := self._spool.add(spec.name, rows, block.values):
            factor = global_factor(complete.peak)
            for name, at, values in complete.blocks():
                self._write_rows(name, at, values, factor)

    def finish(self, config: JsonObject) -> WrittenWeights:
        quantized = len(self._tensors)
        counts = {"format": self.scheme.format, "quantized": quantized, "kept": len(self.wanted) - quantized}
        return WrittenWeights(self.scheme.config(self._selection.ignore), {"compressed": counts})

    def close(self) -> None:
        """Remove what waits on the disk. Safe twice."""
        if self._spool is not None:
            self._spool.close()

    def _write_rows(self, name: str, rows: slice, values: Tensor, factor: Tensor | None) -> None:
        import torch

        specs = self._tensors[name]
        weight, scales = quantize(values, self.scheme, specs["weight_scale"].dtype, factor)
        scaled = slice(rows.start // self.scheme.rows, -(-rows.stop // self.scheme.rows))
        self._shards.write(specs[self.scheme.weight].name, rows, Block(weight))
        self._shards.write(specs["weight_scale"].name, scaled, Block(scales))
        if rows.start == 0 and factor is not None:
            self._shards.write(specs["weight_global_scale"].name, slice(0, 1), Block(factor))
        if rows.start == 0 and self.scheme.shape:
            shape = torch.tensor(self._selection.weights[name].shape)
            self._shards.write(specs["weight_shape"].name, slice(0, 2), Block(shape))
