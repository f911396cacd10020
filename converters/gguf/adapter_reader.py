"""A GGUF adapter read back by the ``gguf`` package and folded onto the base, beside the planned fold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.gguf import architectures, layout
from converters.gguf.scan import scan
from lora2serve.errors import ExportError
from lora2serve.exporter import Model
from lora2serve.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = "adapter.lora.alpha"


class GgufAdapterReader:
    """As llama.cpp applies it: W + scale * B A, with scale alpha / rank, or 1 where alpha is 0."""

    def __init__(self, export: Path, about: Mapping[str, Any], model: Model) -> None:
        from gguf import GGUFReader

        (path,) = sorted(export.rglob("*.gguf"))
        scan(path)
        reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._alpha = float(reader.fields[ALPHA].contents()) if ALPHA in reader.fields else 0.0
        config = architectures.text_config(model.config)
        source: Any = model.source
        specs = {spec.name: spec for spec in source.specs()}
        places = layout.lay_out(list(specs.values()), config, architectures.find(config))
        changed = {name: places[name][0] for name in source.changed() if name in places}
        planned = {f"{place.target}.{part}" for place in changed.values() for part in ("lora_a", "lora_b")}
        self._source, self._places = source, changed
        self.wanted: Mapping[str, int] = {
            name: specs[name].rows  # heads are permuted: a tensor comes whole
            for name, place in changed.items()
            if f"{place.target}.lora_a" in self._tensors and f"{place.target}.lora_b" in self._tensors
        }
        self.differences = [f"{name}: missing" for name in sorted(planned - self._tensors.keys())]
        self.differences += [f"{name}: not planned" for name in sorted(self._tensors.keys() - planned)]

    def pair(self, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[str, Tensor, Tensor]:
        """The base's rows with the stored change, beside the planned ones, in the order of the GGUF's rows."""
        place = self._places[spec.name]
        base = self._source.before(spec.name, rows).float()
        a, b = self._factor(f"{place.target}.lora_a"), self._factor(f"{place.target}.lora_b")
        if (b.shape[0], a.shape[1]) != tuple(base.shape) or b.shape[1] != a.shape[0]:
            raise ExportError(f"{place.target}: B {list(b.shape)} and A {list(a.shape)} for {list(base.shape)}")
        scale = self._alpha / a.shape[0] if self._alpha else 1.0
        return place.target, _ordered(block, place), _ordered(base, place) + scale * (b @ a)

    def _factor(self, name: str) -> Tensor:
        import torch
        from gguf.quants import dequantize

        stored = self._tensors[name]
        shape = tuple(int(length) for length in reversed(stored.shape))
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type).reshape(shape).copy()).float()


def _ordered(values: Tensor, place: layout.Place) -> Tensor:
    return (layout.permute(values, place.heads) if place.heads else values).float()
