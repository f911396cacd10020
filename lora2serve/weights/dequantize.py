"""Quantized weights shown as plain ones.

* bitsandbytes 4-bit (nf4, fp4; absmax quantized or not): ``code[nibble] * absmax`` per block of 64, the
  high nibble first (``bitsandbytes/functional.py``, ``QuantState.as_dict``; https://arxiv.org/abs/2305.14314).
* bitsandbytes int8: ``int8 * SCB / 127`` per row (https://arxiv.org/abs/2208.07339).
* fp8 with one float32 scale per 128 x 128 block (``weight_scale_inv``: DeepSeek V3, Qwen3).
* MXFP4 experts (gpt-oss): 4-bit floats, one power of two per 32 (OCP Microscaling Formats, 1.0).

All in float32 and in row blocks, without a GPU and without bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from lora2serve.errors import CheckpointError
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.checkpoint import Checkpoint, model_dtype
from lora2serve.weights.tensors import ALL, Block, DType, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

INT8_SCALE = 7.874015718698502e-3  # 1/127, as bitsandbytes spells it
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the fourth bit is the sign
DTYPE_NAMES: dict[str, DType] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Packed(Protocol):
    """One quantized weight."""

    @property
    def spec(self) -> TensorSpec:
        """The weight as it looks from outside."""
        ...

    def read(self, rows: slice) -> Tensor:
        """Float32 rows ``[start, stop)``."""
        ...


class Dequantized:
    """A checkpoint whose quantized weights look like plain ones."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self._packed: dict[str, Packed] = {}
        hidden = self._collapse(base.config.get("quantization_config") or {})
        seen = {f"{name}_blocks" if isinstance(p, Mxfp4) else name: p.spec for name, p in self._packed.items()}
        self._specs = [seen.get(s.name, s) for s in base.specs() if s.name not in hidden]

    def specs(self) -> Sequence[TensorSpec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> Block:
        packed = self._packed.get(name)
        if packed is None:
            return self.base.read(name, rows)
        start, stop, _ = rows.indices(packed.spec.rows)
        return Block(packed.read(slice(start, stop)))

    def _collapse(self, config: JsonObject) -> set[str]:
        """Find the quantized weights; the names of their scales and states, which are no weights of their own."""
        method = config.get("quant_method")
        if not config or (method == "bitsandbytes" and not _is_quantized(self.base)):
            return set()
        stored = DTYPE_NAMES.get(model_dtype(self.base.config) or "", "BF16")
        names = [s.name for s in self.base.specs()]
        hidden: set[str] = set()
        for name in names:
            if ".quant_state.bitsandbytes__" in name:
                weight = name.split(".quant_state.")[0]
                self._packed[weight] = FourBit.open(self.base, weight, name)
                hidden |= {n for n in names if n.startswith(f"{weight}.")}
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                self._packed[f"{module}.weight"] = Int8.open(self.base, module, stored)
                hidden |= {name, f"{module}.weight_format"}
            elif name.endswith(".weight_scale_inv"):
                weight = name.removesuffix("_scale_inv")
                self._packed[weight] = Fp8Blocks.open(self.base, weight, stored, config)
                hidden.add(name)
            elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in names:
                packed = Mxfp4.open(self.base, name.removesuffix("_blocks"), stored)
                self._packed[packed.spec.name] = packed
                hidden.add(f"{packed.spec.name}_scales")
        if not self._packed:
            raise CheckpointError(
                f"{self.base.path}: quantized by {method!r}, expected bitsandbytes, block-scaled fp8 or MXFP4",
                "name the full-precision base with --base",
            )
        return hidden


@dataclass(frozen=True)
class FourBit:
    """A weight of packed nibbles."""

    spec: TensorSpec
    base: Checkpoint
    block: int
    nested: int  # blocks of absmax that share one scale; 0 without double quantization
    offset: float

    @classmethod
    def open(cls, base: Checkpoint, weight: str, state: str) -> FourBit:
        raw = base.read(state).values.numpy().tobytes()
        try:
            state_json = json.loads(raw)
            shape, dtype = tuple(state_json["shape"]), DTYPE_NAMES[state_json["dtype"]]
            nested, offset = int(state_json.get("nested_blocksize") or 0), float(state_json.get("nested_offset") or 0)
            packed = cls(TensorSpec(weight, shape, dtype), base, int(state_json["blocksize"]), nested, offset)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{base.path}: {state}: unreadable quantization state ({error})") from None
        if base.spec(weight).nbytes != (prod(shape) + 1) // 2:
            raise CheckpointError(f"{base.path}: {weight}: {base.spec(weight).nbytes} bytes for 4-bit {list(shape)}")
        return packed

    def read(self, rows: slice) -> Tensor:
        """Float32 rows: the blocks of 64 that cover them, cut to size (a row need not be a multiple of 64)."""

        first, last = rows.start * self.spec.row_numel, rows.stop * self.spec.row_numel
        blocks = slice(first // self.block, -(-last // self.block))
        start, stop = blocks.start * self.block, min(blocks.stop * self.block, self.spec.numel)
        codes = self._codes(start, stop)
        values = self.base.read(f"{self.spec.name}.quant_map").values.index_select(0, codes)
        absmax = self._absmax(blocks)
        scaled = scale_blocks(values, absmax, self.block)
        return scaled[first - start : last - start].view(rows.stop - rows.start, *self.spec.shape[1:])

    def _codes(self, start: int, stop: int) -> Tensor:
        import torch

        each = (
            2 * self.base.spec(self.spec.name).nbytes // self.base.spec(self.spec.name).numel
        )  # nibbles per stored element
        rows = slice(start // each, -(-stop // each))
        stored = self.base.spec(self.spec.name)
        if stored.row_numel != 1:  # stored as (1, n): one row holds everything
            packed = self.base.read(self.spec.name).values.view(torch.uint8).flatten()[start // 2 : -(-stop // 2)]
            begin = start // 2 * 2
        else:
            packed = self.base.read(self.spec.name, rows).values.view(torch.uint8).flatten()
            begin = rows.start * each
        return nibbles(packed)[start - begin : stop - begin]

    def _absmax(self, blocks: slice) -> Tensor:
        absmax = self.base.read(f"{self.spec.name}.absmax", blocks).values
        if not self.nested:
            return absmax.float()
        groups = slice(blocks.start // self.nested, -(-blocks.stop // self.nested))
        scales = self.base.read(f"{self.spec.name}.nested_absmax", groups).values
        code = self.base.read(f"{self.spec.name}.nested_quant_map").values
        spread = scales.repeat_interleave(self.nested)[blocks.start - groups.start * self.nested :][: len(absmax)]
        return code.index_select(0, absmax.int()) * spread + self.offset


@dataclass(frozen=True)
class Int8:
    """A weight of signed bytes with one scale per row."""

    spec: TensorSpec
    base: Checkpoint
    scale: str

    @classmethod
    def open(cls, base: Checkpoint, module: str, dtype: DType) -> Int8:
        stored = base.spec(f"{module}.weight")
        return cls(TensorSpec(stored.name, stored.shape, dtype), base, f"{module}.SCB")

    def read(self, rows: slice) -> Tensor:
        scale = self.base.read(self.scale).values.flatten()[rows, None]
        return self.base.read(self.spec.name, rows).values.float() * scale * INT8_SCALE


@dataclass(frozen=True)
class Fp8Blocks:
    """An fp8 weight with one float32 scale per block of rows and columns."""

    spec: TensorSpec
    base: Checkpoint
    block: tuple[int, int]

    @classmethod
    def open(cls, base: Checkpoint, weight: str, dtype: DType, config: JsonObject) -> Fp8Blocks:
        height, width = config.get("weight_block_size") or (128, 128)
        stored, scales = base.spec(weight), base.spec(f"{weight}_scale_inv")
        expected = (*stored.shape[:-2], -(-stored.shape[-2] // height), -(-stored.shape[-1] // width))
        if scales.shape != expected:
            raise CheckpointError(f"{base.path}: {scales.name} is {list(scales.shape)}, expected {list(expected)}")
        return cls(TensorSpec(weight, stored.shape, dtype), base, (height, width))

    def read(self, rows: slice) -> Tensor:
        import torch

        height, width = self.block
        values = self.base.read(self.spec.name, rows).values.float()
        name = f"{self.spec.name}_scale_inv"
        if len(self.spec.shape) == 3:  # one expert per row
            scales = self.base.read(name, rows).values.float().repeat_interleave(height, dim=1)[:, : self.spec.shape[1]]
        else:
            row_blocks = torch.arange(rows.start, rows.stop) // height
            scales = self.base.read(name).values.float()[row_blocks]
        return values * scales.repeat_interleave(width, dim=-1)[..., : self.spec.shape[-1]]


@dataclass(frozen=True)
class Mxfp4:
    """Stacked experts of 4-bit floats: (experts, out, groups, 16) bytes, seen as (experts, groups * 32, out)."""

    spec: TensorSpec
    base: Checkpoint

    @classmethod
    def open(cls, base: Checkpoint, weight: str, dtype: DType) -> Mxfp4:
        blocks, scales = base.spec(f"{weight}_blocks"), base.spec(f"{weight}_scales")
        if len(blocks.shape) != 4 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:-1]:
            raise CheckpointError(
                f"{base.path}: {weight}: blocks {list(blocks.shape)} and scales {list(scales.shape)}, expected "
                "[experts, out, groups, 16] and the same without the 16"
            )
        experts, out, groups, _ = blocks.shape
        return cls(TensorSpec(weight, (experts, groups * 32, out), dtype), base)

    def read(self, rows: slice) -> Tensor:
        import torch

        packed = self.base.read(f"{self.spec.name}_blocks", rows).values
        powers = self.base.read(f"{self.spec.name}_scales", rows).values.int() - 127
        table = torch.tensor([*FP4, *(-value for value in FP4)])
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # the low nibble first
        values = torch.ldexp(table[codes.int()], powers[..., None])
        return values.flatten(-2).transpose(1, 2)


def nibbles(packed: Tensor) -> Tensor:
    """Two 4-bit codes out of each byte, the high one first: (n,) uint8 -> (2n,) int32."""
    import torch

    return torch.stack((packed >> 4, packed & 15), dim=1).flatten().int()


def scale_blocks(values: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Each block of ``values`` (n,) times its scale, in place; the last block may be short."""
    whole = values.numel() // block * block
    values[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    if whole < values.numel():
        values[whole:] *= absmax[-1]
    return values


def _is_quantized(base: Checkpoint) -> bool:
    """A config may carry the training's quantization over weights that are plain."""
    return any(".quant_state.bitsandbytes__" in s.name or s.name.endswith(".SCB") for s in base.specs())
