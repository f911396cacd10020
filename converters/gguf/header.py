"""Everything of a GGUF file but its tensors' data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.gguf import architectures, metadata, vocab
from converters.gguf.imatrix import Imatrix
from converters.gguf.types import PRESETS, Planned
from lora2serve.exporter import Model

ALIGNMENT = 32  # general.alignment, its default


@dataclass(frozen=True)
class Shard:
    """One of ``count`` files; ``tensors`` is the number in all of them."""

    number: int
    count: int
    tensors: int


@dataclass
class Header:
    """Everything of the file but its tensors; written several times: to ask llama.cpp, and then for good."""

    model: Model
    config: Mapping[str, Any]
    architecture: architectures.Architecture
    options: Any  # GgufOptions
    sizes: metadata.Sizes
    rows: int  # of the embedding
    imatrix: Imatrix | None = None

    def __post_init__(self) -> None:
        self._vocab = vocab.read_vocab(self.model, self.architecture, self.rows, self.options.pre)
        self._keys = {
            **metadata.general_keys(self.model, self.architecture, PRESETS[self.options.quant], self.sizes),
            **metadata.architecture_keys(self.config, self.architecture),
            **(self.imatrix.keys() if self.imatrix else {}),
        }

    def new_writer(self, path: Path) -> Any:
        """A GGUFWriter with all metadata and no tensors."""
        from gguf import GGUFWriter, SpecialVocab

        writer = GGUFWriter(path, self.architecture.name)
        for key, value in self._keys.items():
            if key != "general.architecture":  # the writer has it already
                _add(writer, key, value)
        writer.add_tokenizer_model(self._vocab.model)
        if self._vocab.pre:
            writer.add_tokenizer_pre(self._vocab.pre)
        writer.add_token_list(self._vocab.tokens)
        if self._vocab.scores:
            writer.add_token_scores(self._vocab.scores)
        writer.add_token_types(self._vocab.types)
        for key, value in self._vocab.extra.items():
            _add(writer, key, value)
        with vocab.tokenizer_directory(self.model) as folder:
            special = SpecialVocab(folder, load_merges=self._vocab.model == "gpt2", n_vocab=len(self._vocab.tokens))
        if self.options.chat_template is not None:
            special.chat_template = self.options.chat_template
        special.add_to_gguf(writer)
        return writer

    def encode(self, tensors: Sequence[Planned], kinds: Mapping[str, str], shard: Shard | None = None) -> bytes:
        """The bytes before the first tensor's data; a shard after the first carries no keys but its number."""
        import numpy
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        with tempfile.TemporaryDirectory(prefix="lora2serve-header-") as folder:
            path = Path(folder) / "header.gguf"
            writer = self.new_writer(path)
            if shard is not None:
                if shard.number:
                    writer.kv_data[0].clear()
                writer.add_uint16("split.no", shard.number)
                writer.add_uint16("split.count", shard.count)
                writer.add_int32("split.tensors.count", shard.tensors)
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


def _add(writer: Any, key: str, value: Any) -> None:
    """One key in the type llama.cpp reads it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
