"""Quantised weights shown as plain ones, and the round trip that a QLoRA base went through in training.

* bitsandbytes 4-bit (nf4, fp4; absmax quantised or not): ``code[nibble] * absmax`` per block of 64, the
  high nibble first (``bitsandbytes/functional.py``, ``QuantState.as_dict``; https://arxiv.org/abs/2305.14314).
* bitsandbytes int8: ``int8 * SCB / 127`` per row (https://arxiv.org/abs/2208.07339).
* fp8 with one float32 scale per 128 x 128 block (``weight_scale_inv``: DeepSeek V3, Qwen3).

All in float32 and in row blocks, without a GPU and without bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from lora2serve.checkpoint import Checkpoint, model_dtype
from lora2serve.errors import CheckpointError
from lora2serve.tensors import ALL, DType, Source, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

INT8_SCALE = 7.874015718698502e-3  # 1/127, as bitsandbytes spells it
DTYPE_NAMES: dict[str, DType] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Packed(Protocol):
    """One quantised weight."""

    @property
    def spec(self) -> TensorSpec:
        """The weight as it looks from outside."""
        ...

    def read(self, rows: slice) -> Tensor:
        """Float32 rows ``[start, stop)``."""
        ...


class Dequantized:
    """A checkpoint whose quantised weights look like plain ones."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self._packed: dict[str, Packed] = {}
        hidden = self._collapse(base.config.get("quantization_config") or {})
        self._specs = [
            self._packed[s.name].spec if s.name in self._packed else s for s in base.specs() if s.name not in hidden
        ]

    def specs(self) -> Sequence[TensorSpec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        packed = self._packed.get(name)
        if packed is None:
            return self.base.read(name, rows)
        start, stop, _ = rows.indices(packed.spec.rows)
        return packed.read(slice(start, stop))

    def _collapse(self, config: Mapping[str, Any]) -> set[str]:
        """Find the quantised weights; the names of their scales and states, which are no weights of their own."""
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
        if not self._packed:
            raise CheckpointError(
                f"{self.base.path}: quantised by {method!r}, expected bitsandbytes or block-scaled fp8",
                "name the full-precision base with --base",
            )
        return hidden


@dataclass(frozen=True)
class FourBit:
    """A weight of packed nibbles."""

    spec: TensorSpec
    base: Checkpoint
    block: int
    nested: int  # blocks of absmax that share one scale; 0 without double quantisation
    offset: float

    @classmethod
    def open(cls, base: Checkpoint, weight: str, state: str) -> FourBit:
        raw = base.read(state).numpy().tobytes()
        try:
            told = json.loads(raw)
            shape, dtype = tuple(told["shape"]), DTYPE_NAMES[told["dtype"]]
            nested, offset = int(told.get("nested_blocksize") or 0), float(told.get("nested_offset") or 0)
            packed = cls(TensorSpec(weight, shape, dtype), base, int(told["blocksize"]), nested, offset)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{base.path}: {state}: unreadable quantisation state ({error})") from None
        if base.spec(weight).nbytes != (prod(shape) + 1) // 2:
            raise CheckpointError(f"{base.path}: {weight}: {base.spec(weight).nbytes} bytes for 4-bit {list(shape)}")
        return packed

    def read(self, rows: slice) -> Tensor:
        """Float32 rows: the blocks of 64 that cover them, cut to size (a row need not be a multiple of 64)."""

        first, last = rows.start * self.spec.row_numel, rows.stop * self.spec.row_numel
        blocks = slice(first // self.block, -(-last // self.block))
        start, stop = blocks.start * self.block, min(blocks.stop * self.block, self.spec.numel)
        codes = self._codes(start, stop)
        values = self.base.read(f"{self.spec.name}.quant_map").index_select(0, codes)
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
            packed = self.base.read(self.spec.name).view(torch.uint8).flatten()[start // 2 : -(-stop // 2)]
            begin = start // 2 * 2
        else:
            packed = self.base.read(self.spec.name, rows).view(torch.uint8).flatten()
            begin = rows.start * each
        return nibbles(packed)[start - begin : stop - begin]

    def _absmax(self, blocks: slice) -> Tensor:
        absmax = self.base.read(f"{self.spec.name}.absmax", blocks)
        if not self.nested:
            return absmax.float()
        groups = slice(blocks.start // self.nested, -(-blocks.stop // self.nested))
        scales = self.base.read(f"{self.spec.name}.nested_absmax", groups)
        code = self.base.read(f"{self.spec.name}.nested_quant_map")
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
        scale = self.base.read(self.scale).flatten()[rows, None]
        return self.base.read(self.spec.name, rows).float() * scale * INT8_SCALE


@dataclass(frozen=True)
class Fp8Blocks:
    """An fp8 weight with one float32 scale per block of rows and columns."""

    spec: TensorSpec
    base: Checkpoint
    block: tuple[int, int]

    @classmethod
    def open(cls, base: Checkpoint, weight: str, dtype: DType, config: Mapping[str, Any]) -> Fp8Blocks:
        height, width = config.get("weight_block_size") or (128, 128)
        stored, scales = base.spec(weight), base.spec(f"{weight}_scale_inv")
        expected = (*stored.shape[:-2], -(-stored.shape[-2] // height), -(-stored.shape[-1] // width))
        if scales.shape != expected:
            raise CheckpointError(f"{base.path}: {scales.name} is {list(scales.shape)}, expected {list(expected)}")
        return cls(TensorSpec(weight, stored.shape, dtype), base, (height, width))

    def read(self, rows: slice) -> Tensor:
        import torch

        height, width = self.block
        values = self.base.read(self.spec.name, rows).float()
        name = f"{self.spec.name}_scale_inv"
        if len(self.spec.shape) == 3:  # one expert per row
            scales = self.base.read(name, rows).float().repeat_interleave(height, dim=1)[:, : self.spec.shape[1]]
        else:
            row_blocks = torch.arange(rows.start, rows.stop) // height
            scales = self.base.read(name).float()[row_blocks]
        return values * scales.repeat_interleave(width, dim=-1)[..., : self.spec.shape[-1]]


class RoundTrip:
    """A float base as bitsandbytes showed it to the adapter in training: quantised to 4 bits and back.

    Only ``modules`` go through it: those that bitsandbytes really replaced. Quantising is bitsandbytes' own, a
    row block at a time; blocks of 64 stand alone, and the absmax, which double quantisation treats as a
    whole, is computed for the whole weight first.
    """

    def __init__(self, base: Source, modules: Sequence[str], kind: str, block: int, double: bool) -> None:
        import bitsandbytes  # noqa: F401  (here, not first in several threads at once: its kernels register on import)

        self.base, self.kind, self.block, self.double = base, kind, block, double
        self._weights = {f"{module}.weight" for module in modules}
        self._by_name = {spec.name: spec for spec in base.specs()}
        missing = sorted(self._weights - self._by_name.keys())
        if missing:
            raise CheckpointError(
                f"{missing[0]}: quantised in training, but not in this base", "name the base of the training run"
            )
        self._absmax: dict[str, Tensor] = {}
        self._lock = Lock()

    def specs(self) -> Sequence[TensorSpec]:
        return self.base.specs()

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        if name not in self._weights:
            return self.base.read(name, rows)
        spec = self._by_name[name]
        start, stop, _ = rows.indices(spec.rows)
        aligned = self._aligned(spec, start, stop)
        codes, _ = self._quantize(self.base.read(name, aligned))
        return self._dequantize(spec, codes, aligned)[start - aligned.start : stop - aligned.start]

    def _aligned(self, spec: TensorSpec, start: int, stop: int) -> slice:
        """Widen the rows until they begin and end at a block."""
        while start and start * spec.row_numel % self.block:
            start -= 1
        while stop < spec.rows and stop * spec.row_numel % self.block:
            stop += 1
        return slice(start, stop)

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(rows, blocksize=self.block, quant_type=self.kind, compress_statistics=False)
        return codes, state.absmax

    def _dequantize(self, spec: TensorSpec, codes: Tensor, rows: slice) -> Tensor:
        # Not bitsandbytes' dequantize_4bit: its CPU kernel counts blocks from the start of each row, which is
        # another thing than the flat blocks of its own quantiser where a row is no multiple of the block.
        from bitsandbytes.functional import get_4bit_type

        first = rows.start * spec.row_numel // self.block
        numel = (rows.stop - rows.start) * spec.row_numel
        absmax = self._seen_absmax(spec)[first : first - (-numel // self.block)]
        values = get_4bit_type(self.kind, device="cpu").index_select(0, nibbles(codes.flatten())[:numel])
        return scale_blocks(values, absmax, self.block).view(rows.stop - rows.start, *spec.shape[1:])

    def _seen_absmax(self, spec: TensorSpec) -> Tensor:
        """The weight's absmax as the dequantiser saw it: (blocks,) float32."""
        with self._lock:
            if spec.name not in self._absmax:
                while len(self._absmax) > 1:  # blocks come in order: the weight before this one may still be at work
                    self._absmax.pop(next(iter(self._absmax)))
                self._absmax[spec.name] = self._compute_absmax(spec)
            return self._absmax[spec.name]

    def _compute_absmax(self, spec: TensorSpec) -> Tensor:
        import torch
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        rows_each = max(1, (1 << 20) // max(1, spec.row_numel)) * self.block
        parts = []
        for start in range(0, spec.rows, rows_each):
            rows = self.base.read(spec.name, slice(start, min(start + rows_each, spec.rows)))
            parts.append(self._quantize(rows)[1])
        absmax = torch.cat(parts)
        if not self.double:
            return absmax
        offset = absmax.mean()
        codes, state = quantize_blockwise(absmax - offset, blocksize=256)
        seen: Tensor = dequantize_blockwise(codes, state).float() + offset
        return seen


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
    """A config may carry the training's quantisation over weights that are plain."""
    return any(".quant_state.bitsandbytes__" in s.name or s.name.endswith(".SCB") for s in base.specs())
