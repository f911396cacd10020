"""GGUF for llama.cpp, Ollama and LM Studio: from folded row blocks to a quantised file in one pass.

Plan, header, then blocks at their final offsets from any thread. Format: the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), written by the ``gguf`` package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from converters.gguf import architectures, ggml, layout, metadata, proof, types, vocab
from converters.gguf.types import NEEDS_IMATRIX, PRESETS, Planned
from lora2serve.errors import ExportError
from lora2serve.exporter import Model
from lora2serve.output import Output
from lora2serve.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 32  # general.alignment, its default


@dataclass(frozen=True)
class GgufOptions:
    """``tensor_type``: ``pattern=TYPE`` over the preset. ``match_reference``: round to bf16 and f16 first, as the usual
    chain of merge, convert and quantise does. ``chat_template`` replaces the model's in the file.
    """

    quant: str = "Q4_K_M"
    tensor_type: tuple[str, ...] = ()
    pre: str | None = None
    match_reference: bool = False
    chat_template: str | None = None


class GgufSink:
    """One GGUF file."""

    Options: ClassVar[type[GgufOptions]] = GgufOptions
    quants: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    default_quant: ClassVar[str | None] = "Q4_K_M"

    def __init__(self, model: Model, out: Output, options: GgufOptions) -> None:
        if options.quant in NEEDS_IMATRIX:
            raise ExportError(
                f"--quant {options.quant} needs an importance matrix", "use Q3_K_M or IQ4_XS, which need none"
            )
        self._options = options
        self._config = architectures.text_config(model.config)
        self._architecture = architectures.find(self._config)
        specs = list(model.source.specs())
        self._places = layout.lay_out(specs, self._config, self._architecture)
        self._extra = self._extra_tensors()
        tensors = self._plan_tensors(specs)
        self._header = Header(
            model, self._config, self._architecture, options, _parameters(specs), _embedding_rows(specs)
        )
        chosen = types.choose(options.quant, tensors, self._header.new_writer)
        self._types = types.override(chosen, options.tensor_type)
        self.proof = proof.prove(model, self._header.new_writer)
        ggml.prepare(set(self._types.values()))
        self.wanted: Mapping[str, int] = {
            spec.name: layout.together(spec, self._places[spec.name]) for spec in specs if spec.name in self._places
        }
        self.files = [f"{model.name}-{options.quant}.gguf"]
        self._open(out, tensors)

    def write(self, spec: TensorSpec, rows: slice, block: Tensor) -> None:
        place = self._places[spec.name]
        self._put(place.target, *layout.rows_of(place, spec, rows, block))

    def finish(self) -> Mapping[str, Any]:
        import torch

        for name, values in self._extra.items():
            self._put(name, 0, torch.tensor([values]))
        return {
            "architecture": self._architecture.name,
            "file": self.files[0],
            "match_reference": self._options.match_reference,
            "tokens_proven": self.proof.ids,
        }

    def close(self) -> None:
        pass

    def _put(self, target: str, first: int, values: Tensor) -> None:
        import torch

        kind = self._types[target]
        if self._options.match_reference and kind != "F32":
            values = values.to(torch.bfloat16).to(torch.float16).float()
        size = ggml.row_bytes(kind, values.shape[-1])
        self._file.pwrite(ggml.encode(values, kind), self._offsets[target] + first * size)

    def _extra_tensors(self) -> dict[str, list[float]]:
        factors = metadata.rope_factors(self._config)
        return {"rope_freqs.weight": factors} if factors else {}

    def _plan_tensors(self, specs: list[TensorSpec]) -> list[Planned]:
        """Every GGUF tensor once, in file order."""
        planned = [Planned(name, (len(values),)) for name, values in self._extra.items()]
        seen = set()
        for spec in specs:
            place = self._places.get(spec.name)
            if place and place.target not in seen:
                seen.add(place.target)
                planned.append(Planned(place.target, place.shape))
        return planned

    def _open(self, out: Output, tensors: list[Planned]) -> None:
        """Write the header; from it follows where each tensor begins."""
        header = self._header.encode(tensors, self._types)
        offset = len(header)
        self._offsets: dict[str, int] = {}
        padding = []
        for tensor in tensors:
            self._offsets[tensor.name] = offset
            size = _numel(tensor.shape[:-1]) * ggml.row_bytes(self._types[tensor.name], tensor.shape[-1])
            padding.append((offset + size, -size % ALIGNMENT))
            offset += size + -size % ALIGNMENT
        self._file = out.file(self.files[0], offset)
        self._file.pwrite(header, 0)
        for place, count in padding:
            if count:
                self._file.pwrite(bytes(count), place)


@dataclass
class Header:
    """Everything of the file but its tensors; written several times: to ask llama.cpp, and then for good."""

    model: Model
    config: Mapping[str, Any]
    architecture: architectures.Architecture
    options: GgufOptions
    parameters: int
    rows: int  # of the embedding

    def __post_init__(self) -> None:
        self._vocab = vocab.read_vocab(self.model, self.architecture, self.rows, self.options.pre)
        self._keys = {
            **metadata.general_keys(self.model, self.architecture, PRESETS[self.options.quant], self.parameters),
            **metadata.architecture_keys(self.config, self.architecture),
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

    def encode(self, tensors: list[Planned], kinds: Mapping[str, str]) -> bytes:
        """The bytes before the first tensor's data."""
        import numpy
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        with tempfile.TemporaryDirectory(prefix="lora2serve-header-") as folder:
            path = Path(folder) / "header.gguf"
            writer = self.new_writer(path)
            for tensor in tensors:
                kind = GGMLQuantizationType[kinds[tensor.name]]
                shape = quant_shape_to_byte_shape(tensor.shape, kind)
                size = _numel(shape)
                writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), size, raw_dtype=kind)
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


def _parameters(specs: list[TensorSpec]) -> int:
    return sum(spec.numel for spec in specs)


def _embedding_rows(specs: list[TensorSpec]) -> int:
    found = [spec.rows for spec in specs if spec.name.endswith("embed_tokens.weight")]
    if not found:
        raise ExportError("no embed_tokens.weight in this model", "serve it with --target vllm")
    return found[0]


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
