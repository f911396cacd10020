"""A GGUF adapter read back by the ``gguf`` package and folded onto the base, beside the planned fold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.gguf.expert_factors import find_targets
from converters.gguf.gguf_scan import scan
from converters.gguf.quick_reader import open_gguf
from converters.gguf.row_map import RowMaps
from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

ALPHA_KEY = "adapter.lora.alpha"


class GgufAdapterReader:
    """As llama.cpp applies it: W + scale * B A, with scale alpha / rank, or 1 where alpha is 0."""

    def __init__(self, export: Path, manifest: Manifest, model: ExportModel) -> None:
        (path,) = sorted(export.rglob("*.gguf"))
        scan(path)
        reader = open_gguf(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._alpha = float(reader.fields[ALPHA_KEY].contents()) if ALPHA_KEY in reader.fields else 0.0
        source = model.source
        with RowMaps(model) as row_maps:
            self._experts = find_targets(model, row_maps).rows
            others = (name for name in source.changed() if name not in self._experts)
            self._row_maps = {name: maps for name in others if (maps := row_maps.of(name))}
        self._source = source
        targets = {name: [part.target for part in parts] for name, parts in self._experts.items()}
        targets |= {name: [row_map.target for row_map in maps] for name, maps in self._row_maps.items()}
        names = {
            name: [f"{target}.{part}" for target in own for part in ("lora_a", "lora_b")]
            for name, own in targets.items()
        }
        planned = {part for parts in names.values() for part in parts}
        rows = {spec.name: spec.rows for spec in source.specs()}
        self.wanted: Mapping[str, int] = {
            name: rows[name]  # its outputs may lie in any order: a tensor comes whole
            for name, parts in names.items()
            if all(part in self._tensors for part in parts)
        }
        self.differences = [f"{name}: missing" for name in sorted(planned - self._tensors.keys())]
        self.differences += [f"{name}: not planned" for name in sorted(self._tensors.keys() - planned)]

    def pair(self, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[str, Tensor, Tensor]:
        """The base's rows with the stored change, beside the planned ones, in the order of the GGUF's rows."""
        import torch

        base = self._source.before(spec.name, rows).values.float()
        if spec.name in self._experts:
            return self._experts_pair(spec, base, block.float())
        sides: list[tuple[Tensor, Tensor]] = []
        for row_map in self._row_maps[spec.name]:
            a, b = self._factor(f"{row_map.target}.lora_a"), self._factor(f"{row_map.target}.lora_b")
            if (b.shape[0], a.shape[0]) != (len(row_map.outputs), b.shape[1]):
                raise ExportError(
                    f"{row_map.target}: B {list(b.shape)} and A {list(a.shape)} for {len(row_map.outputs)} rows"
                )
            own = row_map.outputs >= 0
            change = (self._alpha / a.shape[0] if self._alpha else 1.0) * (b[own] @ a)
            before, planned = (values.float().T if row_map.transposed else values.float() for values in (base, block))
            order = row_map.outputs[own]
            inputs = slice(None) if row_map.inputs is None else row_map.inputs
            sides.append((planned[order][:, inputs], before[order][:, inputs] + change))
        names = " and ".join(row_map.target for row_map in self._row_maps[spec.name])
        planned, stored = (torch.cat([values.flatten() for values in side]) for side in zip(*sides, strict=True))
        return names, planned, stored

    def _experts_pair(self, spec: TensorSpec, base: Tensor, block: Tensor) -> tuple[str, Tensor, Tensor]:
        import torch

        planned, stored = [], []
        for part in self._experts[spec.name]:
            a, b = self._factor(f"{part.target}.lora_a"), self._factor(f"{part.target}.lora_b")
            experts, out, into = part.shape
            if a.shape != (experts, b.shape[-1], into) or b.shape[:2] != (experts, out):
                raise ExportError(f"{part.target}: B {list(b.shape)} and A {list(a.shape)} for {list(part.shape)}")
            scale = self._alpha / a.shape[1] if self._alpha else 1.0
            planned += [values.flatten() for values in part.matrices(block)]
            pairs = zip(part.experts, part.matrices(base), strict=True)
            stored += [(before + scale * (b[expert] @ a[expert])).flatten() for expert, before in pairs]
        names = " and ".join(part.target for part in self._experts[spec.name])
        return names, torch.cat(planned), torch.cat(stored)

    def again(self, spec: TensorSpec, rows: slice, block: Tensor) -> Tensor | None:
        """Nothing is quantized."""
        return None

    def _factor(self, name: str) -> Tensor:
        import torch
        from gguf.quants import dequantize

        stored = self._tensors[name]
        shape = tuple(int(length) for length in reversed(stored.shape))
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type).reshape(shape).copy()).float()
