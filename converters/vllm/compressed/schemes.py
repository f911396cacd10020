"""The data-free schemes: one table, free of torch, from which a plan follows.

Names, scales and packing are those of compressed-tensors' presets (``quantization/quant_scheme.py``) and compressors;
a test holds each row against what the library itself writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora2serve.weights.tensors import DType, TensorSpec


@dataclass(frozen=True)
class Scheme:
    """How one weight ``[out, in]`` is stored, and what must come together to quantise it."""

    preset: str  # the library's name of the scheme
    format: str  # the library's name of the layout in the files
    weight: str  # the tensor that takes the place of ``weight``
    dtype: DType
    values: int = 1  # in one element of that tensor
    scale: DType | None = None  # None: the type of the model
    group: int | None = None  # columns that share a scale; None: the whole row
    finer: tuple[int, ...] = ()  # groups that vLLM takes too, for models whose columns do not divide by ``group``
    rows: int = 1  # rows that share a scale
    shared: bool = False  # one more scale, over all weights that vLLM fuses into one
    shape: bool = False  # the shape is stored beside the packed weight

    def tensors(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What is stored for a weight: local name -> spec with the full name."""
        module = spec.name.removesuffix("weight")
        out, into = spec.shape
        scales = (-(-out // self.rows), -(-into // self.group) if self.group else 1)
        found: dict[str, tuple[tuple[int, ...], DType]] = {
            self.weight: ((out, -(-into // self.values)), self.dtype),
            "weight_scale": (scales, self.scale or spec.dtype),
        }
        if self.shared:
            found["weight_global_scale"] = ((1,), "F32")
        if self.shape:
            found["weight_shape"] = ((2,), "I64")
        return {key: TensorSpec(module + key, shape, dtype) for key, (shape, dtype) in found.items()}


# nvfp4 and mxfp4 quantise weights only: a static scale of activations would need data.
SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme("FP8_DYNAMIC", "float-quantized", "weight", "F8_E4M3"),
    "fp8-block": Scheme("FP8_BLOCK", "float-quantized", "weight", "F8_E4M3", group=128, rows=128),
    "int8": Scheme("W8A8", "int-quantized", "weight", "I8"),
    "w8a16": Scheme("W8A16", "pack-quantized", "weight_packed", "I32", values=4, group=128, finer=(64, 32), shape=True),
    "w4a16": Scheme("W4A16", "pack-quantized", "weight_packed", "I32", values=8, group=128, finer=(64, 32), shape=True),
    "nvfp4": Scheme(
        "NVFP4A16", "nvfp4-pack-quantized", "weight_packed", "U8", values=2, scale="F8_E4M3", group=16, shared=True
    ),
    "mxfp4": Scheme("MXFP4A16", "mxfp4-pack-quantized", "weight_packed", "U8", values=2, scale="U8", group=32),
}
