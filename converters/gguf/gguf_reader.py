"""A GGUF read back by the ``gguf`` package, beside what was planned for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.gguf import backends, ggml
from converters.gguf.gguf_layout import LayoutOptions
from converters.gguf.gguf_scan import scan
from converters.gguf.presets import FLOAT_TYPES
from converters.gguf.quick_reader import open_gguf
from lora2serve.artifacts.manifest import Manifest
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class GgufReader:
    """The tensors of an export, dequantized row by row; those of the projector too, where it has one."""

    def __init__(self, export: Path, manifest: Manifest, model: ExportModel) -> None:
        files = sorted(export.rglob("*.gguf"))
        for file in files:
            scan(file)
        self._tensors = {tensor.name: tensor for file in files for tensor in open_gguf(file).tensors}
        self._rounded_twice = manifest.match_reference
        options = LayoutOptions(quant=manifest.quant or "F16", match_reference=self._rounded_twice)
        self._backends = backends.open_backends(model, options)
        self.wanted: Mapping[str, int] = backends.rows_at_once(backend.wanted for backend in self._backends)
        planned = {tensor.name for backend in self._backends for tensor in backend.tensors}
        self.differences = [f"{name}: missing" for name in sorted(planned - self._tensors.keys())]
        self.differences += list(self._other_shapes())
        self.differences += [f"{name}: not planned" for name in sorted(self._tensors.keys() - planned)]

    def _other_shapes(self) -> Iterator[str]:
        """In words; such a tensor is not compared."""
        for backend in self._backends:
            for layout in backend.tensors:
                stored = self._tensors.get(layout.name)
                shape = [int(length) for length in reversed(stored.shape)] if stored else list(layout.shape)
                if shape != list(layout.shape):
                    yield f"{layout.name}: stored as {shape}, planned as {list(layout.shape)}"
                    del self._tensors[layout.name]

    def pair(self, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[str, Tensor, Tensor]:
        """See ``lora2serve.exporting.sinks.Reader``. Parts of the file that one block goes to are laid end to end."""
        import torch

        targets = list(self._targets(spec, rows, block))
        pairs = [self._pair(target, first, values) for target, first, values in targets]
        if len(pairs) == 1:
            return targets[0][0], *pairs[0]
        if not pairs:
            return spec.name, torch.empty(0), torch.empty(0)
        planned, stored = (torch.cat([values.flatten() for values in side]) for side in zip(*pairs, strict=True))
        return " and ".join(target for target, _, _ in targets), planned, stored

    def again(self, spec: TensorSpec, rows: slice, block: Tensor) -> Tensor | None:
        """By ggml's quantizer, without an importance matrix; plain parts as they are."""
        import torch

        targets = list(self._targets(spec, rows, block))
        if all(self._tensors[target].tensor_type.name in FLOAT_TYPES for target, _, _ in targets):
            return None
        values = [self._quantized(target, values) for target, _, values in targets]
        return values[0] if len(values) == 1 else torch.cat([part.flatten() for part in values])

    def _targets(self, spec: TensorSpec, rows: slice, block: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        for backend in self._backends:
            if spec.name in backend.wanted:
                parts = backend.targets(spec, rows, block)
                yield from ((target, first, values) for target, first, values in parts if target in self._tensors)

    def _quantized(self, target: str, planned: Tensor) -> Tensor:
        import numpy
        import torch
        from gguf.quants import dequantize

        stored, planned = self._tensors[target], self._rounded(target, planned)
        kind = stored.tensor_type.name
        if kind in FLOAT_TYPES:
            return planned
        even = numpy.ones(planned.shape[-1], numpy.float32) if kind in ggml.TYPES_THAT_NEED_IMATRIX else None
        raw = numpy.frombuffer(ggml.encode(planned, kind, even), numpy.uint8).reshape(len(planned), -1)
        return torch.from_numpy(dequantize(raw, stored.tensor_type).reshape(tuple(planned.shape)).copy())

    def _pair(self, target: str, first: int, expected: Tensor) -> tuple[Tensor, Tensor]:
        import torch
        from gguf.quants import dequantize

        stored = self._tensors[target]
        data = stored.data.reshape(-1, stored.data.shape[-1])[first : first + len(expected)]
        values = torch.from_numpy(dequantize(data, stored.tensor_type).reshape(tuple(expected.shape)).copy())
        return self._rounded(target, expected), values.float()

    def _rounded(self, target: str, expected: Tensor) -> Tensor:
        """Planned values as they are before they are quantized, or as a float type stores them."""
        import torch

        kind = self._tensors[target].tensor_type.name
        if self._rounded_twice and kind != "F32":
            expected = expected.to(torch.float16).float()
        rounded = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
        return expected.to(rounded).float() if rounded else expected
