"""The families that are ours: names, row orders and metadata from the tables of architectures.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from converters.gguf import header, template_copy
from converters.gguf.gguf_layout import LayoutOptions, TensorLayout
from converters.gguf.native import architectures, metadata, native_layout, vocab
from converters.gguf.native.metadata import Sizes
from converters.gguf.presets import PRESETS
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class NativeBackend:
    """One GGUF file of a family we know."""

    def __init__(self, model: ExportModel, options: LayoutOptions) -> None:
        self._model, self._options, self.preset = model, options, options.quant
        self._config = architectures.text_config(model.config)
        self._family = architectures.find(self._config)
        self.architecture = self._family.name
        self._specs = list(model.source.specs())
        self._placements = native_layout.place_tensors(self._specs, self._config, self._family)
        self._rope_factors = metadata.rope_factor_tensors(self._config)
        self.tensors: Sequence[TensorLayout] = self._plan_tensors()
        self.wanted: Mapping[str, int] = {
            spec.name: native_layout.rows_needed(spec, self._placements[spec.name])
            for spec in self._specs
            if spec.name in self._placements
        }

    def keys(self) -> dict[str, header.TypedValue]:
        """General keys, those of the architecture, and the vocabulary."""
        sizes = _parameters(self.tensors)
        vocabulary = vocab.read_vocab(self._model, self._family, _embedding_rows(self._specs), self._options.pre)
        plain = {
            **metadata.general_keys(self._model, self._family, PRESETS[self.preset], sizes),
            **metadata.architecture_keys(self._config, self._family),
        }
        tokenizer = vocab.tokenizer_keys(self._model, vocabulary, self._options.chat_template)
        return template_copy.as_trained_keys(self._model.files, {**header.typed(plain), **tokenizer})

    def targets(self, spec: TensorSpec, rows: slice, block: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(tensor, first row, rows) for each part of the file that a block of stored rows goes to."""
        if self._options.match_reference:
            block = block.to(torch_dtype(spec.dtype))
        for placement in self._placements[spec.name]:
            yield placement.target, *native_layout.rows_of(placement, spec, rows, block)

    def constants(self) -> Iterator[tuple[str, Tensor | bytes]]:
        """Tensors that are computed from the config."""
        for name, values in self._rope_factors.items():
            import torch  # a model without such tensors is planned without torch

            yield name, torch.tensor([values])

    def close(self) -> None:
        """Nothing is held."""

    def _plan_tensors(self) -> list[TensorLayout]:
        """Every GGUF tensor once, in file order."""
        planned = {name: TensorLayout(name, (len(values),)) for name, values in self._rope_factors.items()}
        for spec in self._specs:
            for placement in self._placements.get(spec.name, ()):
                planned.setdefault(placement.target, TensorLayout(placement.target, placement.shape))
        return list(planned.values())


def _parameters(tensors: Sequence[TensorLayout]) -> Sizes:
    """(all, outside the experts, of one expert, experts): what ``gguf.size_label`` makes "8x7B" of."""
    stacked = [tensor.shape for tensor in tensors if "_exps." in tensor.name]
    total = sum(prod(tensor.shape) for tensor in tensors)
    inside = sum(prod(shape) for shape in stacked)
    return total, total - inside, sum(prod(shape[1:]) for shape in stacked), stacked[0][0] if stacked else 0


def _embedding_rows(specs: Sequence[TensorSpec]) -> int:
    rows = [spec.rows for spec in specs if spec.name.endswith("embed_tokens.weight")]
    if not rows:
        raise ExportError("no embed_tokens.weight in this model", "serve it with --target vllm")
    return rows[0]
