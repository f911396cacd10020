"""A GGUF read back by the ``gguf`` package, beside what was planned for it."""

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

COMPUTED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}  # from the config


class GgufReader:
    """The tensors of an export, dequantised row by row."""

    def __init__(self, export: Path, about: Mapping[str, Any], model: Model) -> None:
        from gguf import GGUFReader

        files = sorted(export.rglob("*.gguf"))
        for file in files:
            scan(file)
        self._tensors = {tensor.name: tensor for file in files for tensor in GGUFReader(file).tensors}
        self._rounded_twice = bool(about.get("match_reference"))
        config = architectures.text_config(model.config)
        specs = model.source.specs()
        self._places = layout.lay_out(specs, config, architectures.find(config))
        planned = {place.target for places in self._places.values() for place in places}
        self.wanted: Mapping[str, int] = {
            spec.name: layout.together(spec, self._places[spec.name])
            for spec in specs
            if spec.name in self._places and all(place.target in self._tensors for place in self._places[spec.name])
        }
        self.differences = [f"{name}: missing" for name in sorted(planned - self._tensors.keys())]
        self.differences += [f"{name}: not planned" for name in sorted(self._tensors.keys() - planned - COMPUTED)]

    def pair(self, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[str, Tensor, Tensor]:
        """See ``lora2serve.exporter.Reader``."""
        import torch

        pairs = [self._pair(place, spec, rows, block) for place in self._places[spec.name]]
        name = " and ".join(place.target for place in self._places[spec.name])
        if len(pairs) == 1:
            return name, *pairs[0]
        planned, stored = (torch.cat([values.flatten() for values in side]) for side in zip(*pairs, strict=True))
        return name, planned, stored

    def _pair(self, place: layout.Place, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[Tensor, Tensor]:
        import torch
        from gguf.quants import dequantize

        stored = self._tensors[place.target]
        first, expected = layout.rows_of(place, spec, rows, block)
        shape = tuple(int(length) for length in reversed(stored.shape))
        if shape != tuple(place.shape):
            raise ExportError(f"{place.target}: shape {list(shape)}, expected {list(place.shape)}")
        data = stored.data.reshape(-1, stored.data.shape[-1])[first : first + len(expected)]
        found = torch.from_numpy(dequantize(data, stored.tensor_type).reshape(tuple(expected.shape)).copy())
        kind = stored.tensor_type.name
        if self._rounded_twice and kind != "F32":
            expected = expected.to(torch.bfloat16).to(torch.float16).float()
        plain = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
        return expected.to(plain).float() if plain else expected, found.float()
