"""One GGUF file being filled: rows come in, are encoded, and go to their final offsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from converters.gguf import ggml
from converters.gguf.gguf_layout import Backend
from converters.gguf.gguf_plan import GgufPlan
from converters.gguf.imatrix import Imatrix
from converters.gguf.shards import ShardFiles
from lora2serve.weights.tensors import BLOCK, Block, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class GgufWriter:
    """``match_reference``: round to f16 before a value is quantized, as the usual chain does."""

    def __init__(
        self, backend: Backend, plan: GgufPlan, files: ShardFiles, imatrix: Imatrix | None, *, match_reference: bool
    ) -> None:
        self._backend, self.files = backend, files
        self._imatrix, self._match_reference = imatrix, match_reference
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        ggml.prepare({tensor.type for tensor in plan.tensors})
        self._write_constants()

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        """Take a block of stored rows."""
        if spec.name in self._backend.wanted:
            for target, first, values in self._backend.targets(spec, rows, block.values):
                self._write_rows(target, first, values)

    def _write_constants(self) -> None:
        """What comes from no stored tensor: it often stands first, and nothing can be hashed before it is there."""
        for target, values in self._backend.constants():
            if isinstance(values, bytes):
                self.files.pwrite(target, 0, memoryview(values))
            else:
                self._write_rows(target, 0, values)

    def _write_rows(self, target: str, first: int, values: Tensor) -> None:
        """Rows (n, ne0) of one tensor, encoded a block at a time."""
        import torch

        tensor = self._tensors[target]
        if self._match_reference and tensor.type != "F32":
            values = values.to(torch.float16).float()
        weights = self._imatrix.of(target, tensor.shape) if self._imatrix and len(tensor.shape) > 1 else None
        for start, expert, rows in _blocks(first, values, tensor.shape[-2] if weights is not None else None):
            encoded = ggml.encode(rows, tensor.type, None if weights is None else weights[expert])
            self.files.pwrite(target, start, encoded)


def _blocks(first: int, values: Tensor, rows: int | None) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, expert, rows) in pieces of bounded size; ``rows`` of an expert, where each has its own importance."""
    done, most = 0, max(1, BLOCK // max(1, values.shape[-1]))
    while done < len(values):
        expert, inside = divmod(first + done, rows) if rows else (0, 0)
        count = min(rows - inside if rows else most, len(values) - done, most)
        yield first + done, expert, values[done : done + count]
        done += count
