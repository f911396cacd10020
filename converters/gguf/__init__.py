"""GGUF for llama.cpp, Ollama and LM Studio: from folded row blocks to a quantised file in one pass.

Plan, header, then blocks at their final offsets from any thread. Format: the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), written by the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from converters.gguf import architectures, ggml, imatrix, layout, metadata, proof, types
from converters.gguf.files import Files
from converters.gguf.header import Header
from converters.gguf.metadata import Sizes
from converters.gguf.types import NEEDS_IMATRIX, PRESETS, Planned
from lora2serve.errors import ExportError
from lora2serve.exporter import Model
from lora2serve.output import Output
from lora2serve.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GgufOptions:
    """``tensor_type``: ``pattern=TYPE`` over the preset. ``match_reference``: round to bf16 and f16 first, as the usual
    chain of merge, convert and quantise does. ``imatrix``: an importance matrix. ``split_size``: bytes of a file.
    ``chat_template`` replaces the model's in the file.
    """

    quant: str = "Q4_K_M"
    tensor_type: tuple[str, ...] = ()
    pre: str | None = None
    match_reference: bool = False
    imatrix: Path | None = None
    split_size: int | None = None
    chat_template: str | None = None


class GgufSink:
    """One GGUF file, or a split one."""

    Options: ClassVar[type[GgufOptions]] = GgufOptions
    quants: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    default_quant: ClassVar[str | None] = "Q4_K_M"

    def __init__(self, model: Model, out: Output, options: GgufOptions) -> None:
        if options.quant in NEEDS_IMATRIX and options.imatrix is None:
            raise ExportError(
                f"--quant {options.quant} needs an importance matrix", "give --imatrix FILE or --calibrate DATA"
            )
        self._options = options
        self._config = architectures.text_config(model.config)
        self._architecture = architectures.find(self._config)
        specs = list(model.source.specs())
        self._places = layout.lay_out(specs, self._config, self._architecture)
        self._extra = metadata.extra_tensors(self._config)
        tensors = self._plan_tensors(specs)
        self._shapes = {tensor.name: tensor.shape for tensor in tensors}
        self._imatrix = imatrix.fit(imatrix.read(options.imatrix), self._shapes) if options.imatrix else None
        header = Header(
            model,
            self._config,
            self._architecture,
            options,
            _parameters(tensors),
            _embedding_rows(specs),
            self._imatrix,
        )
        chosen = types.choose(options.quant, tensors, header.new_writer, self._imatrix)
        self._types = types.override(chosen, options.tensor_type)
        types.require_imatrix(self._types, self._imatrix)
        self.proof = proof.prove(model, header.new_writer)
        ggml.prepare(set(self._types.values()))
        self.wanted: Mapping[str, int] = {
            spec.name: layout.together(spec, self._places[spec.name]) for spec in specs if spec.name in self._places
        }
        self._files = Files(out, f"{model.name}-{options.quant}", header, tensors, self._types, options.split_size)
        self.files = self._files.names

    def write(self, spec: TensorSpec, rows: slice, block: Tensor) -> None:
        for place in self._places[spec.name]:
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

        kind, shape = self._types[target], self._shapes[target]
        if self._options.match_reference and kind != "F32":
            values = values.to(torch.bfloat16).to(torch.float16).float()
        weights = self._imatrix.of(target, shape) if self._imatrix and len(shape) > 1 else None
        if weights is None:
            self._files.pwrite(target, first, shape[-1], ggml.encode(values, kind))
            return
        for start, expert, part in _by_expert(first, values, shape[-2]):  # each has its own importance
            self._files.pwrite(target, start, shape[-1], ggml.encode(part, kind, weights[expert]))

    def _plan_tensors(self, specs: list[TensorSpec]) -> list[Planned]:
        """Every GGUF tensor once, in file order."""
        planned = {name: Planned(name, (len(values),)) for name, values in self._extra.items()}
        for spec in specs:
            for place in self._places.get(spec.name, ()):
                planned.setdefault(place.target, Planned(place.target, place.shape))
        return list(planned.values())


def _by_expert(first: int, values: Tensor, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Rows cut where the experts of a stacked weight begin: (first row, expert, its rows)."""
    done = 0
    while done < len(values):
        expert, inside = divmod(first + done, rows)
        count = min(rows - inside, len(values) - done)
        yield first + done, expert, values[done : done + count]
        done += count


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
