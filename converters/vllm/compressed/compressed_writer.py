"""Row blocks of plain weights in, row blocks of what compressed-tensors stores out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from converters.safetensors import ShardWriter
from converters.vllm.compressed.quantize import global_factor, quantize
from converters.vllm.compressed.schemes import SCHEMES
from converters.vllm.compressed.selection import select
from converters.vllm.compressed.spool import Spool
from converters.vllm.weight_writer import WrittenWeights
from lora2serve.artifacts.staging import StagedDir
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import Block, TensorSpec, row_blocks

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
        stored = [list(self._stored(spec)) for spec in specs]
        self._kept = stored.count([])
        pairs = zip(specs, stored, strict=True)
        self._shards = ShardWriter(out, [part for spec, parts in pairs for part in parts or [spec]], shard)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        if spec.name in self._selection.stacks:
            experts = self._selection.stacks[spec.name].take_apart(rows, block.values)
            for weight, values in chain.from_iterable(experts):
                for at in row_blocks(weight, self.scheme.rows):
                    self._write(weight.name, at, values[at])
        elif spec.name in self._tensors:
            self._write(spec.name, rows, block.values)
        else:
            self._shards.write(spec.name, rows, block)

    def finish(self, config: JsonObject) -> WrittenWeights:
        counts = {"format": self.scheme.format, "quantized": len(self._tensors), "kept": self._kept}
        return WrittenWeights(self.scheme.config(self._selection.ignore), {"compressed": counts})

    def close(self) -> None:
        """Remove what waits on the disk. Safe twice."""
        if self._spool is not None:
            self._spool.close()

    def _stored(self, spec: TensorSpec) -> Iterator[TensorSpec]:
        """What takes the place of a tensor; nothing for one that stays."""
        stack = self._selection.stacks.get(spec.name)
        weights = chain.from_iterable(stack.weights()) if stack else [spec] if spec.name in self._tensors else []
        for weight in weights:
            yield from self._tensors[weight.name].values()

    def _write(self, name: str, rows: slice, values: Tensor) -> None:
        if self._spool is None:
            self._write_rows(name, rows, values, None)
        elif complete := self._spool.add(name, rows, values):
            factor = global_factor(complete.peak)
            for part, at, block in complete.blocks():
                self._write_rows(part, at, block, factor)

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
