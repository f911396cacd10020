"""The header-first shard writer: offsets follow from shapes alone, blocks stream in after.

Format: https://github.com/huggingface/safetensors#format; the index is transformers' ``model.safetensors.index.json``.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.staging import StagedDir, StagedFile
from lora2serve.errors import CheckpointError, ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.exporting.stored_tensors import TensorBytes
from lora2serve.system.small_files import without_repeated
from lora2serve.weights.checkpoint import INDEX, SINGLE
from lora2serve.weights.tensors import Block, TensorSpec, all_finite, itemsize, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = {"F16": "float16 (65504", "BF16": "bfloat16 (3.39e38"}
SHARD = 5_000_000_000  # bytes, what save_pretrained uses by default


class ShardWriter:
    """Tensors laid into shards of at most ``shard`` bytes, in the given order."""

    def __init__(self, out: StagedDir, specs: Sequence[TensorSpec], shard: int = SHARD) -> None:
        groups = _group(specs, shard)
        names = (
            [SINGLE]
            if len(groups) == 1
            else [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
        )
        self._offsets: dict[str, tuple[StagedFile, int]] = {}
        self._specs = {spec.name: spec for spec in specs}
        for name, group in zip(names, groups, strict=True):
            self._allocate(out, name, group)
        if len(groups) > 1:
            total = sum(spec.nbytes for spec in specs)
            weight_map = {spec.name: name for name, group in zip(names, groups, strict=True) for spec in group}
            out.json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def write(self, name: str, rows: slice, block: Block) -> None:
        """Rows of one tensor, cast to the planned type (the one rounding) and put in their place."""
        spec = self._specs[name]
        file, offset = self._offsets[name]
        file.pwrite(as_bytes(cast(block, spec)), offset + rows.start * spec.row_numel * itemsize(spec.dtype))

    def _allocate(self, out: StagedDir, name: str, group: Sequence[TensorSpec]) -> None:
        header = encode_header(group)
        file = out.file(name, len(header) + sum(spec.nbytes for spec in group))
        file.pwrite(header, 0)
        offset = len(header)
        for spec in group:
            self._offsets[spec.name] = (file, offset)
            offset += spec.nbytes


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON header of one file, padded with spaces to a multiple of eight bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def tensor_table(path: Path, data: mmap.mmap | bytes) -> list[TensorBytes]:
    """The tensors of a file, by their offsets; ``data`` is at least its header. CheckpointError where it is none."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start], object_pairs_hook=without_repeated)
        tensors = [
            TensorBytes(name, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}", "fetch or export it again") from None
    return sorted(tensors, key=lambda tensor: tensor.start)


def cast(block: Block, spec: TensorSpec) -> Tensor:
    """The rows in the type they are stored in; a value that this type cannot hold is an error."""
    known = block.in_dtype(spec.dtype)
    if known is not None:
        return known
    stored = block.values.to(torch_dtype(spec.dtype))
    if spec.dtype in LARGEST and not all_finite(stored):
        raise ExportError(
            f"{spec.name}: {float(block.values.abs().max()):.4g} does not fit {LARGEST[spec.dtype]} at most)",
            f"export with --dtype {'bf16' if spec.dtype == 'F16' else 'fp32'}",
        )
    return stored


def as_bytes(values: Tensor) -> memoryview:
    """The tensor's bytes, little-endian, without a copy where it is contiguous."""
    import torch

    return values.contiguous().flatten().view(torch.uint8).numpy().data


class SafetensorsReader:
    """The plain weights of an export, opened by the safetensors library."""

    def __init__(self, export: Path, manifest: Manifest, model: ExportModel) -> None:
        from safetensors import safe_open

        files: list[Any] = [safe_open(path, "pt") for path in sorted(export.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
        planned = {spec.name: spec for spec in model.source.specs()}
        other = {name: other_kind(spec, self._files[name]) for name, spec in planned.items() if name in self._files}
        self.wanted: Mapping[str, int] = {name: 1 for name, difference in other.items() if not difference}
        self.differences = [f"{name}: missing" for name in sorted(planned.keys() - self._files.keys())]
        self.differences += [f"{name}: not planned" for name in sorted(self._files.keys() - planned.keys())]
        self.differences += [difference for difference in other.values() if difference]

    def pair(self, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[str, Tensor, Tensor]:
        stored = self._files[spec.name].get_slice(spec.name)
        values = stored[rows] if spec.shape else self._files[spec.name].get_tensor(spec.name)
        return spec.name, block.to(values.dtype).float(), values.float()

    def again(self, spec: TensorSpec, rows: slice, block: Tensor) -> Tensor | None:
        """Nothing is quantized."""
        return None


def other_kind(spec: TensorSpec, file: Any) -> str:
    """In what a plain tensor is stored otherwise than planned; nothing where it is not. ``file``: by safetensors."""
    stored = file.get_slice(spec.name)
    kind, shape = stored.get_dtype(), tuple(stored.get_shape())
    if (kind, shape) == (spec.dtype, spec.shape):
        return ""
    return f"{spec.name}: stored as {kind} {list(shape)}, planned as {spec.dtype} {list(spec.shape)}"


def _group(specs: Sequence[TensorSpec], shard: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > shard:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    return groups
