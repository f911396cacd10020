"""The families that are ours: names, row orders and metadata from the tables of architectures.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.gguf.native import architectures, metadata, native_layout, vocab
from converters.gguf.native.metadata import Sizes
from converters.gguf.presets import PRESETS, Planned
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Native:
    """One GGUF file of a family we know."""

    def __init__(self, model: ExportModel, options: Any) -> None:
        self._model, self._options, self.preset = model, options, options.quant
        self._config = architectures.text_config(model.config)
        self._family = architectures.find(self._config)
        self.architecture = self._family.name
        specs = list(model.source.specs())
        self._places = native_layout.lay_out(specs, self._config, self._family)
        self._extra = metadata.extra_tensors(self._config)
        self.tensors: Sequence[Planned] = self._plan_tensors(specs)
        self.wanted: Mapping[str, int] = {
            spec.name: native_layout.together(spec, self._places[spec.name])
            for spec in specs
            if spec.name in self._places
        }
        self._vocab = vocab.read_vocab(model, self._family, _embedding_rows(specs), options.pre)
        self._keys = {
            **metadata.general_keys(model, self._family, PRESETS[options.quant], _parameters(self.tensors)),
            **metadata.architecture_keys(self._config, self._family),
        }

    def targets(self, spec: TensorSpec, rows: slice, block: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(tensor, first row, rows) for each part of the file that a block of stored rows goes to."""
        if self._options.match_reference:
            block = block.to(torch_dtype(spec.dtype))
        for place in self._places[spec.name]:
            yield place.target, *native_layout.rows_of(place, spec, rows, block)

    def rest(self) -> Iterator[tuple[str, Tensor | bytes]]:
        """Tensors that are computed from the config."""
        for name, values in self._extra.items():
            import torch  # a model without such tensors is planned without torch

            yield name, torch.tensor([values])

    def new_writer(self, path: Path) -> Any:
        """A GGUFWriter with all metadata and no tensors."""
        from gguf import GGUFWriter, SpecialVocab

        writer = GGUFWriter(path, self.architecture)
        for key, value in self._keys.items():
            if key != "general.architecture":  # the writer has it already
                metadata.add_key(writer, key, value)
        writer.add_tokenizer_model(self._vocab.model)
        if self._vocab.pre:
            writer.add_tokenizer_pre(self._vocab.pre)
        writer.add_token_list(self._vocab.tokens)
        if self._vocab.scores:
            writer.add_token_scores(self._vocab.scores)
        writer.add_token_types(self._vocab.types)
        for key, value in self._vocab.extra.items():
            metadata.add_key(writer, key, value)
        with vocab.tokenizer_directory(self._model) as folder:
            special = SpecialVocab(folder, load_merges=self._vocab.model == "gpt2", n_vocab=len(self._vocab.tokens))
        if self._options.chat_template is not None:
            special.chat_template = self._options.chat_template
        special.add_to_gguf(writer)
        return writer

    def close(self) -> None:
        """Nothing is held."""

    def _plan_tensors(self, specs: list[TensorSpec]) -> list[Planned]:
        """Every GGUF tensor once, in file order."""
        planned = {name: Planned(name, (len(values),)) for name, values in self._extra.items()}
        for spec in specs:
            for place in self._places.get(spec.name, ()):
                planned.setdefault(place.target, Planned(place.target, place.shape))
        return list(planned.values())


def _parameters(tensors: Sequence[Planned]) -> Sizes:
    """(all, outside the experts, of one expert, experts): what ``gguf.size_label`` makes "8x7B" of."""
    stacked = [tensor.shape for tensor in tensors if "_exps." in tensor.name]
    total = sum(prod(tensor.shape) for tensor in tensors)
    inside = sum(prod(shape) for shape in stacked)
    return total, total - inside, sum(prod(shape[1:]) for shape in stacked), stacked[0][0] if stacked else 0


def _embedding_rows(specs: list[TensorSpec]) -> int:
    found = [spec.rows for spec in specs if spec.name.endswith("embed_tokens.weight")]
    if not found:
        raise ExportError("no embed_tokens.weight in this model", "serve it with --target vllm")
    return found[0]
