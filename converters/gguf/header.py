"""The bytes of a GGUF file before its tensors' data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.gguf.imatrix import Imatrix
from converters.gguf.native import metadata
from converters.gguf.presets import Planned
from lora2serve.errors import ExportError

ALIGNMENT = 32  # general.alignment, its default
NewWriter = Callable[[Path], Any]  # makes a GGUFWriter with all metadata and no tensors


@dataclass(frozen=True)
class Shard:
    """One of ``count`` files; ``tensors`` is the number in all of them."""

    number: int
    count: int
    tensors: int


def with_imatrix(writer: Any, imatrix: Imatrix | None) -> Any:
    """The writer, with what llama-quantize says of an importance matrix."""
    for key, value in (imatrix.keys() if imatrix else {}).items():
        metadata.add_key(writer, key, value)
    return writer


def _refuse_twins(writer: Any) -> None:
    """Two tokens of one text: llama.cpp ends its process, and with it ours, when it loads such a file."""
    tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value if "tokenizer.ggml.tokens" in writer.kv_data[0] else []
    if len(set(tokens)) == len(tokens):
        return
    seen: dict[Any, int] = {}
    for number, token in enumerate(tokens):
        if token in seen:
            raise ExportError(
                f"tokenizer: tokens {seen[token]} and {number} are both {token!r}, expected each text once",
                "mend tokenizer.json: llama.cpp takes no vocabulary with two tokens of one text",
            )
        seen[token] = number


def encode(
    new_writer: NewWriter, tensors: Sequence[Planned], kinds: Mapping[str, str], shard: Shard | None = None
) -> bytes:
    """The bytes before the first tensor's data; a shard after the first carries no keys but its number."""
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    with tempfile.TemporaryDirectory(prefix="lora2serve-header-") as folder:
        path = Path(folder) / "header.gguf"
        writer = new_writer(path)
        if shard is not None:
            if shard.number:
                writer.kv_data[0].clear()
            writer.add_uint16("split.no", shard.number)
            writer.add_uint16("split.count", shard.count)
            writer.add_int32("split.tensors.count", shard.tensors)
        _refuse_twins(writer)
        for tensor in tensors:
            kind = GGMLQuantizationType[kinds[tensor.name]]
            shape = quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), prod(shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        raw = path.read_bytes()
    return raw + bytes(-len(raw) % ALIGNMENT)
