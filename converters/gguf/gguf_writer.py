"""One GGUF file under way: planned from a layout, then filled with encoded rows at their final offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.gguf import ggml, header, presets
from converters.gguf.imatrix import Imatrix
from converters.gguf.llama.llama_process import Llama
from converters.gguf.presets import Planned
from converters.gguf.shards import ShardFiles, padded, size_of
from lora2serve.artifacts.staging import StagedDir
from lora2serve.weights.tensors import BLOCK, Block, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class Layout(Protocol):
    """What a file consists of, and where its values come from. Native (ours) and Upstream (llama.cpp's) are two."""

    architecture: str
    preset: str  # the --quant of this file
    tensors: Sequence[Planned]
    wanted: Mapping[str, int]  # as a sink's

    def targets(self, spec: TensorSpec, rows: slice, block: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(tensor, first row, values (n, ne0)) for each part of the file that a block of stored rows completes."""
        ...

    def rest(self) -> Iterator[tuple[str, Tensor | bytes]]:
        """Tensors that come from no stored one: values (n, ne0), or bytes in the file's own type."""
        ...

    def new_writer(self, path: Path) -> Any:
        """A GGUFWriter with all metadata and no tensors."""
        ...

    def close(self) -> None:
        """Release what is held. Safe twice."""
        ...


class GgufWriter:
    """Planned and refused in the constructor; ``lay`` claims the files, ``write`` fills them."""

    def __init__(
        self, layout: Layout, llama: Llama, imatrix: Imatrix | None, overrides: Sequence[str] = (), *,
        match_reference: bool = False,
    ) -> None:  # fmt: skip
        self.layout, self._imatrix, self._match_reference = layout, imatrix, match_reference
        self._shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        chosen = presets.choose(layout.preset, layout.tensors, self.new_writer, llama, imatrix)
        self._types = presets.override(chosen, overrides)
        presets.require_imatrix(self._types, imatrix)
        presets.require_whole_blocks(self._types, self._shapes)
        ggml.prepare(set(self._types.values()))
        self._files: ShardFiles | None = None
        self._whole: bytes | None = None  # from the proof until it is laid

    def new_writer(self, path: Path) -> Any:
        """The layout's, and what llama-quantize writes about an importance matrix."""
        return header.with_imatrix(self.layout.new_writer(path), self._imatrix)

    def allocate(self, out: StagedDir, stem: str, split_size: int | None = None) -> list[str]:
        """Write the headers, and what comes from no stored tensor; the files' names.

        That often stands first in a file, and nothing can be hashed before it is there.
        """
        self._files = ShardFiles(out, stem, self._header, self.layout.tensors, self._types, split_size)
        self._whole = None
        for target, values in self.layout.rest():
            if isinstance(values, bytes):
                self._files.pwrite(target, 0, self._shapes[target][-1], memoryview(values))
            else:
                self._put(target, 0, values)
        return self._files.names

    def write_empty(self, path: Path) -> None:
        """The whole file in one piece, its tensors' data left out (a hole on the disk)."""
        raw = self._header(self.layout.tensors, None)
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(len(raw) + sum(padded(size_of(tensor, self._types)) for tensor in self.layout.tensors))

    def _header(self, tensors: Sequence[Planned], shard: header.Shard | None) -> bytes:
        """The bytes before the data; of the whole file once, as proven and as written: a vocabulary takes its time."""
        if shard is not None:
            return header.encode(self.new_writer, tensors, self._types, shard)
        if self._whole is None:
            self._whole = header.encode(self.new_writer, tensors, self._types)
        return self._whole

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        """Take a block of stored rows."""
        if spec.name in self.layout.wanted:
            for target, first, values in self.layout.targets(spec, rows, block.values):
                self._put(target, first, values)

    def _put(self, target: str, first: int, values: Tensor) -> None:
        """Rows (n, ne0) of one tensor, encoded a block at a time."""
        import torch

        assert self._files is not None
        kind, shape = self._types[target], self._shapes[target]
        if self._match_reference and kind != "F32":
            values = values.to(torch.float16).float()
        weights = self._imatrix.of(target, shape) if self._imatrix and len(shape) > 1 else None
        for start, expert, part in _blocks(first, values, shape[-2] if weights is not None else None):
            encoded = ggml.encode(part, kind, None if weights is None else weights[expert])
            self._files.pwrite(target, start, shape[-1], encoded)


def _blocks(first: int, values: Tensor, rows: int | None) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, expert, rows) in pieces of bounded size; ``rows`` of an expert, where each has its own importance."""
    done, most = 0, max(1, BLOCK // max(1, values.shape[-1]))
    while done < len(values):
        expert, inside = divmod(first + done, rows) if rows else (0, 0)
        count = min(rows - inside if rows else most, len(values) - done, most)
        yield first + done, expert, values[done : done + count]
        done += count
