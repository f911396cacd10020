"""Quantized weights read back: dequantized by compressed-tensors' own decompressors, in row blocks.

What each weight is comes from ``quantization_config`` in the export's config.json, not from the table of schemes: any
compressed-tensors export with one config group is read, calibrated ones too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.safetensors import other_kind
from converters.vllm.compressed.quantize import quantize
from converters.vllm.compressed.schemes import SCHEMES, Scheme
from converters.vllm.compressed.selection import stacks_in
from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import FLOATS, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("weight_packed", "weight")
PER_TENSOR = {"weight_global_scale", "weight_shape", "input_global_scale"}
ZERO = "weight_zero_point"


class CompressedReader:
    """See ``lora2serve.exporting.sinks.Reader``."""

    def __init__(self, export: Path, manifest: Manifest, model: ExportModel) -> None:
        from safetensors import safe_open

        scheme, compressor = _library()
        files: list[Any] = [safe_open(path, "pt") for path in sorted(export.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        groups = list(config["config_groups"].values())
        if len(groups) != 1:
            raise ExportError(f"{export}: {len(groups)} groups of quantized layers, expected one")
        self._how = scheme.model_validate(groups[0])
        self._compressor = compressor.get_value_from_registry(groups[0].get("format") or config["format"])
        self._stacks = stacks_in(model.source.specs(), model.config)
        weights = {spec.name: list(self._weights_in(spec)) for spec in model.source.specs()}
        planned = {weight.name: weight for parts in weights.values() for weight in parts}
        self._parts = {name: self._stored(name) for name in planned}
        self._quantized = {name for name, parts in self._parts.items() if self._is_quantized(parts)}
        self.differences = [f"{name}: missing" for name, parts in self._parts.items() if not parts]
        lost = {name: self._lost(name) for name in self._quantized}
        for name, spec in planned.items():
            if self._parts[name] and name not in self._quantized and (other := other_kind(spec, self._files[name])):
                lost[name] = [other]
        self.differences += [part for parts in lost.values() for part in parts]
        self._scheme = self._known_scheme(str(groups[0].get("format") or config["format"]))
        self.wanted: Mapping[str, int] = {
            name: self._together() if name in self._quantized else 1
            for name, parts in weights.items()
            if all(self._parts[weight.name] and not lost.get(weight.name) for weight in parts)
        }
        known = {stored for parts in self._parts.values() for stored in parts.values()}
        self.differences += [f"{name}: not planned" for name in sorted(self._files.keys() - known)]

    def pair(self, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[str, Tensor, Tensor]:
        """The stored name, the planned rows and the dequantized ones, or those of a plain tensor, in float32."""
        if spec.name in self._stacks:
            stack = self._stacks[spec.name]
            experts = [[self._values(part, slice(0, part.rows)) for part in own] for own in stack.weights(rows)]
            return spec.name, block.float(), stack.join(experts)
        if spec.name in self._quantized:
            return spec.name, block.float(), self._values(spec, rows)
        stored = self._files[spec.name].get_slice(spec.name)
        values = stored[rows] if spec.shape else self._files[spec.name].get_tensor(spec.name)
        return spec.name, block.to(values.dtype).float(), values.float()

    def again(self, spec: TensorSpec, rows: slice, block: Tensor) -> Tensor | None:
        """By our own scales, the largest value of what shares one; None where the scheme has zero points."""
        if self._scheme is None or (spec.name not in self._quantized and spec.name not in self._stacks):
            return None
        if spec.name not in self._stacks:
            return self._requantized(spec, rows, block, self._scheme)
        experts = self._stacks[spec.name].take_apart(rows, block)
        again = [[self._requantized(part, slice(0, part.rows), own, self._scheme) for part, own in e] for e in experts]
        return self._stacks[spec.name].join(again)

    def _weights_in(self, spec: TensorSpec) -> Iterator[TensorSpec]:
        """The matrices that a planned tensor is stored as: itself, or its experts."""
        stack = self._stacks.get(spec.name)
        yield from chain.from_iterable(stack.weights()) if stack else [spec]

    def _values(self, spec: TensorSpec, rows: slice) -> Tensor:
        """Quantized rows, dequantized."""
        return self._decompressed(spec, rows, self._state(spec, rows))

    def _requantized(self, spec: TensorSpec, rows: slice, block: Tensor, scheme: Scheme) -> Tensor:
        """Planned rows, quantized by our own scales and dequantized."""
        state, scale = self._state(spec, rows), self._parts[spec.name]["weight_scale"]
        dtype = self._files[scale].get_slice(scale).get_dtype()
        weight, scales = quantize(block, scheme, dtype, state.get("weight_global_scale"))
        own = {scheme.weight: weight, "weight_scale": scales.float() if scales.element_size() == 2 else scales}
        return self._decompressed(spec, rows, state | own)

    def _state(self, spec: TensorSpec, rows: slice) -> dict[str, Tensor]:
        """What is stored of some rows, by local name."""
        return {key: self._read(key, name, rows, spec) for key, name in self._parts[spec.name].items()}

    def _decompressed(self, spec: TensorSpec, rows: slice, state: dict[str, Tensor]) -> Tensor:
        count = rows.stop - rows.start
        if "weight_shape" in state:
            _refuse_shape(spec, tuple(state["weight_shape"].tolist()))
            state["weight_shape"][0] = count
        values: Tensor = self._compressor.decompress(state, self._how)["weight"][:count].float()
        if tuple(values.shape) != (count, *spec.shape[1:]):
            raise ExportError(f"{spec.name}: {list(values.shape)} of rows {rows.start} to {rows.stop}")
        return values

    def _known_scheme(self, layout: str) -> Scheme | None:
        """Ours of that format and as many bits, with the group of the file."""
        weights = self._how.weights
        if not weights.symmetric:
            return None
        alike = (s for s in SCHEMES.values() if s.format == layout and s.bits == int(weights.num_bits))
        scheme = next((s for s in alike if (s.rows > 1) == bool(weights.block_structure)), None)
        if scheme is None or scheme.rows > 1:
            return scheme
        return replace(scheme, group=int(weights.group_size) if weights.group_size else None)

    def _stored(self, name: str) -> dict[str, str]:
        """Local name -> stored name of everything that belongs to one planned tensor; empty where it is missing."""
        if not name.endswith(".weight"):
            return {"weight": name} if name in self._files else {}
        module = name.removesuffix("weight")
        keys = (*WEIGHTS, "weight_scale", ZERO, *PER_TENSOR)
        stored_names = {key: module + key for key in keys if module + key in self._files}
        return stored_names if any(key in stored_names for key in WEIGHTS) else {}

    def _is_quantized(self, parts: Mapping[str, str]) -> bool:
        plain = parts.get("weight")
        return "weight_packed" in parts or (
            bool(plain) and self._files[plain].get_slice(plain).get_dtype() not in FLOATS
        )

    def _lost(self, name: str) -> list[str]:
        """What must lie beside a quantized weight and does not."""
        keys = self._compressor.compression_param_names(self._how)
        missing = [key for key in keys if key not in self._parts[name] and key not in self._unused()]
        return [f"{name.removesuffix('weight')}{key}: missing" for key in missing]

    def _unused(self) -> set[str]:
        """Names that the library lists for a format, and that this scheme of it has not."""
        return {"weight_g_idx", *(() if self._how.weights.strategy == "tensor_group" else ("weight_global_scale",))}

    def _together(self) -> int:
        """Rows of one piece: those that share a scale, or that the zero points of one word belong to."""
        weights = self._how.weights
        if weights.block_structure:
            return int(weights.block_structure[0])
        return 1 if weights.symmetric else 32 // int(weights.num_bits)

    def _read(self, key: str, name: str, rows: slice, spec: TensorSpec) -> Tensor:
        stored = self._files[name].get_slice(name)
        if key in PER_TENSOR:
            whole: Tensor = self._files[name].get_tensor(name).clone()
            return whole
        count = stored.get_shape()[0]
        expected = spec.rows if key in WEIGHTS else self._scaled(spec.rows, key)
        if count != expected:
            raise ExportError(f"{name}: {count} rows, expected {expected}")
        start, stop = self._scaled(rows.start, key), self._scaled(rows.stop, key)
        values: Tensor = stored[start:stop]
        return values.float() if key == "weight_scale" and values.element_size() == 2 else values

    def _scaled(self, row: int, key: str) -> int:
        """The row of one stored tensor that belongs to a row of the weight, rounded up."""
        if key in WEIGHTS:
            return row
        if key == ZERO:
            return -(-row // self._together())
        blocks = self._how.weights.block_structure
        return -(-row // blocks[0]) if blocks else row


def _library() -> tuple[Any, Any]:
    """Its schemes, and its registry of formats. It imports transformers' models: seconds, in a process of parity's."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        hint = "pip install compressed-tensors==0.17.0"
        raise ExportError("compressed-tensors, which reads the export back, is not installed", hint) from None
    return QuantizationScheme, BaseCompressor


def _refuse_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    if shape != spec.shape:
        raise ExportError(f"{spec.name}: shape {list(shape)}, expected {list(spec.shape)}")
