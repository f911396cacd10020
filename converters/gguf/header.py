"""The bytes of a GGUF file before its tensors' data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from converters.gguf import ggml
from lora2serve.errors import ExportError
from lora2serve.system import scratch

if TYPE_CHECKING:
    from gguf import GGUFWriter

ALIGNMENT = 32  # general.alignment, its default
TOKENS_KEY = "tokenizer.ggml.tokens"
GgufValue: TypeAlias = (
    str | bytes | int | float | Sequence[str] | Sequence[bytes] | Sequence[bool] | Sequence[int] | Sequence[float]
)


@dataclass(frozen=True)
class TypedValue:
    """The value of a key, and gguf's GGUFValueType of it and of its elements; None: those of the first one."""

    value: GgufValue
    type: int
    element_type: int | None = None


Keys = Mapping[str, TypedValue]  # in file order


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: its shape as llama.cpp counts rows (the last is a row's length), and its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return ggml.row_bytes(self.type, self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def padded(self) -> int:
        """Bytes up to where the next tensor may begin."""
        return self.nbytes + -self.nbytes % ALIGNMENT


def typed(values: Mapping[str, GgufValue]) -> dict[str, TypedValue]:
    """Keys in the types llama.cpp reads them in; empty texts and lists are left out, as gguf's writer does."""
    from gguf import GGUFValueType

    types = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    keys = {}
    for key, value in values.items():
        if isinstance(value, bool | int | float) or value:
            kind = next((kind for python, kind in types.items() if isinstance(value, python)), GGUFValueType.ARRAY)
            keys[key] = TypedValue(value, int(kind))
    return keys


def collected(writer: GGUFWriter) -> dict[str, TypedValue]:
    """The keys that were added to a GGUFWriter."""
    return {
        key: TypedValue(entry.value, int(entry.type), None if entry.sub_type is None else int(entry.sub_type))
        for key, entry in writer.kv_data[0].items()
    }


def open_writer(path: Path, keys: Keys) -> GGUFWriter:
    """A GGUFWriter with these keys and no tensors."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # the architecture is among the keys
    for key, entry in keys.items():
        element = None if entry.element_type is None else GGUFValueType(entry.element_type)
        writer.add_key_value(key, entry.value, GGUFValueType(entry.type), element)
    return writer


def encode(keys: Keys, tensors: Sequence[GgufTensor]) -> bytes:
    """The bytes before the first tensor's data."""
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    _refuse_twins(keys)
    with scratch.temporary_folder("header") as folder:
        path = Path(folder) / "header.gguf"
        writer = open_writer(path, keys)
        for tensor in tensors:
            kind = GGMLQuantizationType[tensor.type]
            shape = quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), prod(shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        raw = path.read_bytes()
    return raw + bytes(-len(raw) % ALIGNMENT)


def _refuse_twins(keys: Keys) -> None:
    """Two tokens of one text: llama.cpp ends its process, and with it ours, when it loads such a file."""
    tokens = keys[TOKENS_KEY].value if TOKENS_KEY in keys else []
    assert isinstance(tokens, Sequence)
    if len(set(tokens)) == len(tokens):
        return
    first: dict[object, int] = {}
    for number, token in enumerate(tokens):
        if token in first:
            raise ExportError(
                f"tokenizer: tokens {first[token]} and {number} are both {token!r}, expected each text once",
                "correct tokenizer.json: llama.cpp needs a different text for each token",
            )
        first[token] = number
