"""The data-free schemes: one table, free of torch, from which a plan follows.

Names, scales, packing and the entry in config.json are those of compressed-tensors' presets
(``quantization/quant_scheme.py``) and compressors; a test holds each row against what the library itself writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora2serve.weights.tensors import DType, TensorSpec

FORMAT_VERSION = "0.17.0"  # of compressed-tensors, whose layout this is


@dataclass(frozen=True)
class Scheme:
    """How one weight ``[out, in]`` is stored, and what must come together to quantize it."""

    format: str  # the library's name of the layout in the files
    kind: Literal["int", "float"]
    bits: int
    dtype: DType  # of what takes the place of ``weight``
    scale: DType | None = None  # None: the type of the model
    group: int | None = None  # columns that share a scale; None: the whole row
    finer: tuple[int, ...] = ()  # groups that vLLM takes too, for models whose columns do not divide by ``group``
    rows: int = 1  # rows that share a scale
    activations: bool = False  # quantized to 8 bits as they come, too
    shared: bool = False  # one more scale, over all weights that vLLM fuses into one

    @property
    def packed(self) -> bool:
        """Whether several values lie in one element."""
        return self.format.endswith("pack-quantized")

    @property
    def shape(self) -> bool:
        """Whether the shape is stored beside the packed weight."""
        return self.format == "pack-quantized"

    @property
    def weight(self) -> str:
        """The local name of the tensor that takes the place of ``weight``."""
        return "weight_packed" if self.packed else "weight"

    @property
    def values(self) -> int:
        """Values in one element of that tensor."""
        return (32 if self.dtype == "I32" else 8) // self.bits

    @property
    def strategy(self) -> str:
        """The library's word for what shares a scale."""
        if self.group is None:
            return "channel"
        return "block" if self.rows > 1 else "tensor_group" if self.shared else "group"

    def tensors(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What is stored for a weight: local name -> spec with the full name."""
        module = spec.name.removesuffix("weight")
        out, into = spec.shape
        scales = (-(-out // self.rows), -(-into // self.group) if self.group else 1)
        stored: dict[str, tuple[tuple[int, ...], DType]] = {
            self.weight: ((out, -(-into // self.values)), self.dtype),
            "weight_scale": (scales, self.scale or spec.dtype),
        }
        if self.shared:
            stored["weight_global_scale"] = ((1,), "F32")
        if self.shape:
            stored["weight_shape"] = ((2,), "I64")
        return {key: TensorSpec(module + key, shape, dtype) for key, (shape, dtype) in stored.items()}

    def config(self, ignore: Sequence[str]) -> dict[str, object]:
        """``quantization_config`` for config.json, as llm-compressor writes it."""
        scale = {"F8_E4M3": "torch.float8_e4m3fn", "U8": "torch.uint8"}.get(self.scale or "")
        weights = _arguments(
            self.bits, self.kind, self.strategy, group_size=self.group if self.rows == 1 else None,
            block_structure=[self.rows, self.group] if self.rows > 1 else None, scale_dtype=scale,
            observer="memoryless_minmax",
        )  # fmt: skip
        grouped = "group" if self.strategy == "block" else "token"
        size = self.group if self.strategy == "block" else None
        activations = _arguments(8, self.kind, grouped, group_size=size, dynamic=True)
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations if self.activations else None,
            "output_activations": None,
            "format": self.format,
        }
        return {
            "version": FORMAT_VERSION,
            "quant_method": "compressed-tensors",
            "sparsity_config": {},
            "transform_config": {},
            "config_groups": {"group_0": group},
            "kv_cache_scheme": None,
            "format": self.format,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(ignore),
        }


def _arguments(
    bits: int, kind: str, strategy: str, *, group_size: int | None, dynamic: bool = False,
    block_structure: object = None, scale_dtype: str | None = None, observer: str | None = None,
) -> dict[str, object]:  # fmt: skip
    """The library's ``QuantizationArgs``, with its defaults spelled out, in its order."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "group_size": group_size,
        "strategy": strategy,
        "block_structure": block_structure,
        "dynamic": dynamic,
        "actorder": None,
        "scale_dtype": scale_dtype,
        "zp_dtype": None,
        "observer": observer,
        "observer_kwargs": {},
    }


# nvfp4 and mxfp4 quantize weights only: a static scale of activations would need data.
SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme("float-quantized", "float", 8, "F8_E4M3", activations=True),
    "fp8-block": Scheme("float-quantized", "float", 8, "F8_E4M3", group=128, rows=128, activations=True),
    "int8": Scheme("int-quantized", "int", 8, "I8", activations=True),
    "w8a16": Scheme("pack-quantized", "int", 8, "I32", group=128, finer=(64, 32)),
    "w4a16": Scheme("pack-quantized", "int", 4, "I32", group=128, finer=(64, 32)),
    "nvfp4": Scheme("nvfp4-pack-quantized", "float", 4, "U8", scale="F8_E4M3", group=16, shared=True),
    "mxfp4": Scheme("mxfp4-pack-quantized", "float", 4, "U8", scale="U8", group=32),
}
