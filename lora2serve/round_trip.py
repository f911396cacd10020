"""The round trip that a QLoRA base went through in training: quantised to 4 bits and back, row block by row block."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from lora2serve.dequantize import nibbles, scale_blocks
from lora2serve.errors import CheckpointError
from lora2serve.tensors import ALL, Source, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


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
