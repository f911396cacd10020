"""Importance matrices: the mean square of each input column of a weight, which the low-bit types need.

llama.cpp's two formats (``tools/imatrix/imatrix.cpp``, ``common/imatrix-loader.cpp``): a GGUF with
``<tensor>.in_sum2`` and ``<tensor>.counts``, and the older binary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from converters.gguf.gguf_scan import MAGIC, Cursor, scan
from lora2serve.errors import CheckpointError, ExportError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Matrix: TypeAlias = "NDArray[np.float32]"
CHUNK_TOKENS = 512  # as llama.cpp counts them


@dataclass(frozen=True)
class Imatrix:
    """``means``: GGUF tensor name -> (experts or 1, columns) float32."""

    file: str
    means: Mapping[str, Matrix]
    datasets: tuple[str, ...] = ()
    chunks: int = 0

    def of(self, name: str, shape: Sequence[int]) -> Matrix | None:
        """The means for a weight of that shape (its last axis is a row); None where it has none."""
        means = self.means.get(name)
        if means is None:
            return None
        expected = (shape[0] if len(shape) == 3 else 1, shape[-1])
        if means.shape != expected:
            raise ExportError(
                f"{self.file}: {name} is {list(means.shape)}, expected {list(expected)}",
                "it was made for another model",
            )
        return means

    def keys(self) -> dict[str, str | int]:
        """What llama-quantize writes about it into a GGUF."""
        keys: dict[str, str | int] = {"quantize.imatrix.file": self.file}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = self.datasets[0]
        keys["quantize.imatrix.entries_count"] = len(self.means)
        if self.chunks > 0:
            keys["quantize.imatrix.chunks_count"] = self.chunks
        return keys


def read(path: Path) -> Imatrix:
    """Either format; CheckpointError for a file that is none."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "--imatrix takes llama.cpp's format") from None
    imatrix = _read_gguf(path) if magic == MAGIC else _read_legacy(path)
    if not imatrix.means:
        raise CheckpointError(f"{path}: an importance matrix without entries", "make it again")
    import numpy

    bad = [name for name, values in imatrix.means.items() if not numpy.isfinite(values).all() or (values < 0).any()]
    if bad:
        raise CheckpointError(f"{path}: {bad[0]} holds values that are negative or not finite", "make it again")
    return imatrix


def _read_gguf(path: Path) -> Imatrix:
    import numpy
    from gguf import GGUFReader

    scan(path)
    reader = GGUFReader(path)
    tensors = {tensor.name: numpy.array(tensor.data, numpy.float32) for tensor in reader.tensors}
    means = {}
    for name, sums in tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        weight = name.removesuffix(".in_sum2")
        counts = tensors.get(f"{weight}.counts")
        if counts is None or sums.size % counts.size:
            raise CheckpointError(f"{path}: {weight} has no matching counts", "make it again")
        tokens = counts.reshape(-1, 1)
        mean = sums.reshape(counts.size, -1) / numpy.maximum(tokens, 1)
        means[weight] = numpy.where(tokens > 0, mean, 1).astype(numpy.float32)  # an expert that nothing was routed to
    datasets = reader.fields.get("imatrix.datasets")
    chunks = reader.fields.get("imatrix.chunk_count")
    return Imatrix(
        path.name,
        means,
        tuple(datasets.contents()) if datasets else (),
        int(chunks.contents()) if chunks else 0,
    )


def _read_legacy(path: Path) -> Imatrix:
    import numpy

    cursor = Cursor(path, path.read_bytes())
    count = cursor.number("i", "entry count")
    if not 0 < count <= len(cursor.data) // 12:
        raise CheckpointError(
            f"{path}: not an importance matrix ({count} entries)", "--imatrix takes llama.cpp's format"
        )
    means = {}
    for number in range(count):
        name = cursor.take(_length(cursor, f"name of entry {number}"), f"name of entry {number}").decode(
            "utf-8", "replace"
        )
        calls, values = cursor.number("i", f"calls of {name}"), _length(cursor, f"values of {name}")
        raw = numpy.frombuffer(cursor.take(4 * values, name), numpy.float32)
        means[name] = (raw / max(calls, 1)).astype(numpy.float32).reshape(1, -1)
    chunks = 0
    datasets: tuple[str, ...] = ()
    if cursor.position < len(cursor.data):
        chunks = cursor.number("i", "chunk count")
        datasets = (cursor.take(_length(cursor, "data set"), "data set").decode("utf-8", "replace"),)
    return Imatrix(path.name, means, datasets, chunks)


def _length(cursor: Cursor, what: str) -> int:
    length = cursor.number("i", what)
    if length < 1:
        cursor.fail(f"{what}: length {length}")
    return length


def fit(imatrix: Imatrix, shapes: Mapping[str, Sequence[int]]) -> Imatrix:
    """The legacy format keeps stacked experts in one row; ``shapes``: GGUF tensor -> shape."""
    means = {
        name: values.reshape(-1, shapes[name][-1]) if name in shapes and values.size % shapes[name][-1] == 0 else values
        for name, values in imatrix.means.items()
    }
    return Imatrix(imatrix.file, means, imatrix.datasets, imatrix.chunks)


def write(path: Path, sums: Mapping[str, Matrix], counts: Mapping[str, Matrix], dataset: str, tokens: int) -> None:
    """llama.cpp's GGUF format. ``sums``: tensor -> (experts or 1, columns), ``counts``: tensor -> (experts or 1,)."""
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", max(1, tokens // CHUNK_TOKENS))
    writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", numpy.ascontiguousarray(values, numpy.float32))
        writer.add_tensor(f"{name}.counts", numpy.ascontiguousarray(counts[name], numpy.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
