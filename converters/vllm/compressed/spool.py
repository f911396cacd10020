"""Blocks that wait on the disk until the last one of their tensors has come."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING

from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass
class SpoolGroup:
    """Tensors that are complete only together."""

    left: int  # rows that have not come
    file: IO[bytes]  # without a name: it goes with the handle
    end: int = 0
    places: list[tuple[str, slice, int, dtype, tuple[int, ...]]] = field(default_factory=list)
    peak: float = 0.0  # the largest absolute value of them all

    def blocks(self) -> Iterator[tuple[str, slice, Tensor]]:
        """Every block as it came, (name, rows, values); the file is closed at the end."""
        import torch

        with self.file as file:
            for name, rows, offset, kind, shape in self.places:
                buffer = torch.empty(shape, dtype=kind)
                view = buffer.flatten().view(torch.uint8).numpy().data
                done = 0
                while done < len(view):
                    done += os.preadv(file.fileno(), [view[done:]], offset + done)
                yield name, rows, buffer


class Spool:
    """``groups`` maps each tensor to all of its group. The files lie beside the export: the same disk has room."""

    def __init__(self, groups: Mapping[str, tuple[str, ...]], specs: Mapping[str, TensorSpec], folder: Path) -> None:
        self._groups, self._specs, self._folder = groups, specs, folder
        self._open: dict[tuple[str, ...], SpoolGroup] = {}
        self._lock = Lock()

    def add(self, name: str, rows: slice, block: Tensor) -> SpoolGroup | None:
        """Keep a block; the group, once, when this was its last."""
        import torch

        low, high = (float(value) for value in torch.aminmax(block))
        key = self._groups[name]
        data = block.contiguous().flatten().view(torch.uint8).numpy().data
        with self._lock:
            group = self._open.get(key)
            if group is None:
                left = sum(self._specs[part].rows for part in key)
                group = self._open[key] = SpoolGroup(left, self._file())
            offset, group.end = group.end, group.end + len(data)
            group.places.append((name, rows, offset, block.dtype, tuple(block.shape)))
            group.peak = max(group.peak, -low, high)
        done = 0
        while done < len(data):
            done += os.pwrite(group.file.fileno(), data[done:], offset + done)
        with self._lock:
            group.left -= rows.stop - rows.start
            return self._open.pop(key) if group.left == 0 else None

    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._folder)

    def close(self) -> None:
        """Give back what waits. Safe twice."""
        while self._open:
            self._open.popitem()[1].file.close()
