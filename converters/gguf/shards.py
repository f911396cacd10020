"""The GGUF file, or the several that a split one is: header first, then bytes at their final offsets."""

from __future__ import annotations

from converters.gguf.gguf_plan import GgufPlan
from converters.gguf.header import GgufTensor
from lora2serve.artifacts.staging import StagedDir, StagedFile


def stem(model: str, quant: str) -> str:
    """What the name of a model's file begins with."""
    return f"{model}-{quant}"


def projector_stem(model: str, quant: str) -> str:
    """The same of its projector."""
    return f"mmproj-{model}-{quant}"


def file_names(stem: str, count: int) -> list[str]:
    """The names of so many files, as llama.cpp finds the others of a split one."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


class ShardFiles:
    """Allocated with their headers in the constructor. ``split_size``: the most bytes of tensor data in one file."""

    def __init__(self, out: StagedDir, stem: str, plan: GgufPlan, split_size: int | None = None) -> None:
        self._offsets: dict[str, tuple[StagedFile, int, GgufTensor]] = {}  # tensor -> where its data begins
        shards = plan.split(split_size)
        self.names = file_names(stem, len(shards))
        for name, shard in zip(self.names, shards, strict=True):
            self._allocate(out, name, shard)

    def pwrite(self, target: str, row: int, data: memoryview) -> None:
        """Encoded rows of one tensor, from that row on."""
        file, offset, tensor = self._offsets[target]
        file.pwrite(data, offset + row * tensor.row_bytes)

    def _allocate(self, out: StagedDir, name: str, shard: GgufPlan) -> None:
        file = out.file(name, shard.size)
        file.pwrite(shard.header, 0)
        offset = len(shard.header)
        for tensor in shard.tensors:
            self._offsets[tensor.name] = file, offset, tensor
            if tensor.padded > tensor.nbytes:
                file.pwrite(bytes(tensor.padded - tensor.nbytes), offset + tensor.nbytes)
            offset += tensor.padded
