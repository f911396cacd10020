"""The GGUF file, or the several that a split one is: header first, then bytes at their final offsets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from converters.gguf import ggml
from converters.gguf.header import ALIGNMENT, Shard
from converters.gguf.presets import Planned
from lora2serve.artifacts.staging import StagedDir, StagedFile

Header = Callable[[Sequence[Planned], Shard | None], bytes]  # the bytes before the data of these tensors


@dataclass(frozen=True)
class Offset:
    """Where a tensor's data begins."""

    file: StagedFile
    offset: int


class ShardFiles:
    """``split``: the most bytes of tensor data in one file; a larger tensor has a file of its own."""

    def __init__(
        self, out: StagedDir, stem: str, header: Header, tensors: Sequence[Planned], kinds: Mapping[str, str],
        split: int | None = None,
    ) -> None:  # fmt: skip
        self._kinds = kinds
        self._spots: dict[str, Offset] = {}
        groups = _group(tensors, kinds, split)
        count = len(groups)
        self.names = (
            [f"{stem}.gguf"]
            if count == 1
            else [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        )
        for number, (name, group) in enumerate(zip(self.names, groups, strict=True)):
            shard = Shard(number, count, len(tensors)) if count > 1 else None
            self._lay(out, name, header(group, shard), group)

    def pwrite(self, target: str, row: int, columns: int, data: memoryview) -> None:
        """Encoded rows of one tensor, from that row on."""
        spot = self._spots[target]
        spot.file.pwrite(data, spot.offset + row * ggml.row_bytes(self._kinds[target], columns))

    def _lay(self, out: StagedDir, name: str, header: bytes, group: Sequence[Planned]) -> None:
        offset = len(header)
        places = []
        for tensor in group:
            places.append(offset)
            offset += padded(size_of(tensor, self._kinds))
        file = out.file(name, offset)
        file.pwrite(header, 0)
        for tensor, place in zip(group, places, strict=True):
            self._spots[tensor.name] = Offset(file, place)
            size = size_of(tensor, self._kinds)
            if padded(size) > size:
                file.pwrite(bytes(padded(size) - size), place + size)


def size_of(tensor: Planned, kinds: Mapping[str, str]) -> int:
    """Bytes of a tensor's data."""
    return prod(tensor.shape[:-1]) * ggml.row_bytes(kinds[tensor.name], tensor.shape[-1])


def padded(size: int) -> int:
    """Up to where the next tensor may begin."""
    return size + -size % ALIGNMENT


def _group(tensors: Sequence[Planned], kinds: Mapping[str, str], split: int | None) -> list[list[Planned]]:
    groups: list[list[Planned]] = [[]]
    total = 0
    for tensor in tensors:
        size = padded(size_of(tensor, kinds))
        if split and groups[-1] and total + size > split:
            groups.append([])
            total = 0
        groups[-1].append(tensor)
        total += size
    return groups
