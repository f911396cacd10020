"""A bounded look at a GGUF file before its library reads it: gguf's own reader may hang on a broken one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the ways to be broken are those that llama.cpp's
``tests/test-gguf.cpp`` lists. Every length is checked against what is left of the file before it is believed.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lora2serve.errors import CheckpointError
from lora2serve.exporting.stored_tensors import TensorBytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
STRING, ARRAY, UINT32 = 8, 9, 4
MAX_NAME, MAX_KEY, MAX_DIMS = 63, 65535, 4  # GGML_MAX_NAME - 1; the specification; GGML_MAX_DIMS
MAX_NUMEL = 2**63 - 1


@dataclass
class Cursor:
    """A position in the file that cannot leave it."""

    path: Path
    data: mmap.mmap | bytes
    position: int = 0

    def take(self, count: int, what: str) -> bytes:
        """The next bytes; CheckpointError where the file has not so many."""
        left = len(self.data) - self.position
        if count > left:
            self.fail(f"{what}: {count} bytes at byte {self.position}, but {left} are left")
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def number(self, layout: str, what: str) -> int:
        return int(struct.unpack(f"<{layout}", self.take(struct.calcsize(layout), what))[0])

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", f"length of {what}")
        if limit is not None and length > limit:
            self.fail(f"{what}: {length} bytes long, expected {limit} at most")
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            if limit is not None:
                self.fail(f"{what}: {raw[:40]!r} is not UTF-8")
            return ""  # a value may hold any bytes, as tokens do

    def fail(self, problem: str) -> None:
        raise CheckpointError(f"{self.path}: not a valid GGUF file: {problem}", "fetch or export it again")


def scan(path: Path) -> dict[str, str]:
    """Tensor -> type, in file order; CheckpointError as in ``scan_tensors``."""
    return {tensor.name: tensor.type for tensor in scan_tensors(path)}


def scan_tensors(path: Path) -> list[TensorBytes]:
    """The tensors, in file order; CheckpointError with the first thing that is wrong. Reads no tensor data."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise CheckpointError(f"{path}: not a valid GGUF file: it is empty", "fetch or export it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = Cursor(path, data)
            tensors, end = _scan(cursor)
            if tensors and end > len(data):
                cursor.fail(f"tensor data ends at byte {end}, but the file has {len(data)}")
            return tensors


def tensor_table(path: Path, data: mmap.mmap | bytes) -> list[TensorBytes]:
    """The tensors of a file, in file order; ``data`` is at least its header. CheckpointError as in ``scan_tensors``."""
    return _scan(Cursor(path, data))[0]


def _scan(cursor: Cursor) -> tuple[list[TensorBytes], int]:
    """The tensors, and the byte after the last one and its padding."""
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        cursor.fail(f"starts with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("I", "version")
    if version not in VERSIONS:
        cursor.fail(f"version {version}, expected one of {', '.join(map(str, VERSIONS))}")
    tensors, pairs = cursor.number("Q", "tensor count"), cursor.number("Q", "key count")
    left = len(cursor.data) - cursor.position
    # the smallest key takes 8 + 1 + 4 + 1 bytes, the smallest tensor 8 + 1 + 4 + 8 + 4 + 8
    if pairs * 14 > left or tensors * 33 > left:
        cursor.fail(f"{tensors} tensors and {pairs} keys in {left} bytes")
    alignment = _keys(cursor, pairs)
    return _tensors(cursor, tensors, alignment)


def _keys(cursor: Cursor, count: int) -> int:
    """Walk all keys; the alignment of tensor data."""
    seen, alignment = set(), 32
    for number in range(count):
        key = cursor.text(f"key {number}", MAX_KEY)
        if not key or key in seen:
            cursor.fail(f"key {key!r} twice" if key else f"key {number} has no name")
        seen.add(key)
        kind = cursor.number("I", f"type of {key}")
        if key == "general.alignment":
            if kind != UINT32:
                cursor.fail(f"general.alignment of type {kind}, expected {UINT32}")
            alignment = cursor.number("I", key)
            if not alignment or alignment & (alignment - 1):
                cursor.fail(f"general.alignment {alignment}, expected a power of two")
        else:
            _value(cursor, kind, key)
    return alignment


def _value(cursor: Cursor, kind: int, key: str) -> None:
    if kind == STRING:
        cursor.text(key)
    elif kind == ARRAY:
        inner, length = cursor.number("I", f"element type of {key}"), cursor.number("Q", f"length of {key}")
        if inner == STRING:
            if length * 8 > len(cursor.data) - cursor.position:
                cursor.fail(f"{key}: {length} strings, but the file ends before")
            for _ in range(length):
                cursor.text(key)
        elif inner in VALUE_SIZES:
            _skip(cursor, length * VALUE_SIZES[inner], key)
        else:
            cursor.fail(f"{key}: an array of type {inner}, expected numbers or strings")
    elif kind in VALUE_SIZES:
        _skip(cursor, VALUE_SIZES[kind], key)
    else:
        cursor.fail(f"{key}: type {kind}, expected 0 to 12")


def _skip(cursor: Cursor, count: int, what: str) -> None:
    if count > len(cursor.data) - cursor.position:
        cursor.fail(f"{what}: {count} bytes, but {len(cursor.data) - cursor.position} are left")
    cursor.position += count


def _tensors(cursor: Cursor, count: int, alignment: int) -> tuple[list[TensorBytes], int]:
    """Shapes and offsets must have the data in order, without holes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    seen: set[str] = set()
    found: list[tuple[str, str, tuple[int, ...], int, int]] = []
    end = 0
    for number in range(count):
        name = cursor.text(f"name of tensor {number}", MAX_NAME)
        if name in seen:
            cursor.fail(f"tensor {name} twice")
        seen.add(name)
        shape = _shape(cursor, name)
        kind, offset = cursor.number("I", f"type of {name}"), cursor.number("Q", f"offset of {name}")
        if kind not in kinds:
            cursor.fail(f"{name}: type {kind} is unknown")
        numel = prod(shape)
        elements, size = GGML_QUANT_SIZES[kinds[kind]]
        if numel > MAX_NUMEL or (shape and shape[0] % elements):
            cursor.fail(f"{name}: shape {shape}, expected rows of a multiple of {elements}")
        if offset != end:
            cursor.fail(f"{name}: data at {offset}, expected {end}")
        stop = end + numel // elements * size
        found.append((name, kinds[kind].name, tuple(reversed(shape)), end, stop))
        end = stop + -stop % alignment
    start = cursor.position + -cursor.position % alignment
    tensors = [TensorBytes(name, kind, own, start + first, start + stop) for name, kind, own, first, stop in found]
    return tensors, start + end


def _shape(cursor: Cursor, name: str) -> list[int]:
    """As it is stored: a row's length first."""
    dims = cursor.number("I", f"dimensions of {name}")
    if dims > MAX_DIMS:
        cursor.fail(f"{name}: {dims} dimensions, expected {MAX_DIMS} at most")
    return [cursor.number("Q", f"shape of {name}") for _ in range(dims)]
