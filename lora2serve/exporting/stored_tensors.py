"""Where the tensors lie in a file, whatever its format: name, type, shape, and which bytes are theirs."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pkgutil import resolve_name
from typing import TypeAlias

from lora2serve.errors import CheckpointError

# What reads the header of a file; a name is a string until it is used, as in sinks.py.
HEADER_READERS = {
    ".gguf": "converters.gguf.gguf_scan:tensor_table",
    ".safetensors": "converters.safetensors:tensor_table",
}


@dataclass(frozen=True)
class TensorBytes:
    """One tensor: its type as the format names it, its shape (the last axis is a row's length), its bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.stop - self.start

    @property
    def kind(self) -> str:
        """Type and shape, as a report has them."""
        return f"{self.type} {list(self.shape)}"

    def row_of(self, byte: int) -> int:
        """The row that a byte of the data belongs to."""
        rows = prod(self.shape[:-1])
        return byte * rows // self.nbytes if self.nbytes else 0


HeaderReader: TypeAlias = Callable[[Path, mmap.mmap | bytes], Sequence[TensorBytes]]


def read_header(path: Path, data: mmap.mmap | bytes) -> Sequence[TensorBytes]:
    """The tensors of a file, in the order of their bytes; ``data`` is the file, or as much of it as is the header.

    CheckpointError where the header is none of this format.
    """
    if path.suffix not in HEADER_READERS:
        raise CheckpointError(f"{path}: a file of {path.suffix or 'no'} format, expected {' or '.join(HEADER_READERS)}")
    reader: HeaderReader = resolve_name(HEADER_READERS[path.suffix])
    return reader(path, data)


def read_tensors(path: Path) -> Sequence[TensorBytes]:
    """Those of a file on the disk; CheckpointError where it is damaged."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return read_header(path, b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_header(path, data)
