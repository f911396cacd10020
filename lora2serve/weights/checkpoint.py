"""A base model on disk: the header index of a safetensors directory, its config and its identity.

Format: a little-endian u64 header length, that many bytes of JSON, then the data without holes
(https://github.com/huggingface/safetensors#format). Reads go by ``pread``, not by a mapping: nothing
counts as ours but the block in hand, and a file that shrinks under us is an error, not a SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2serve.errors import LONGEST_WORD, CheckpointError, raise_all
from lora2serve.system.hub_snapshot import hub_snapshot
from lora2serve.system.small_files import MAX_SIZE, JsonObject, digest, inside, read_json, without_repeated
from lora2serve.weights.tensors import ALL, DTYPES, Block, TensorSpec, itemsize, torch_dtype

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PARTS = ("text_config", "vision_config", "audio_config")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")  # a module is made for each
MOST_LAYERS = 2000
LONGEST_VALUE = 60  # characters that are shown


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored."""

    spec: TensorSpec
    file: Path
    offset: int  # of its first byte, from the start of the file


class SafetensorsFiles:
    """Tensors in one or several safetensors files: a Source without a model around it."""

    def __init__(self, stored: Iterable[StoredTensor]) -> None:
        self._stored = {item.spec.name: item for item in stored}
        self._fds: dict[Path, int] = {}

    def specs(self) -> Sequence[TensorSpec]:
        return [item.spec for item in self._stored.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def spec(self, name: str) -> TensorSpec:
        """The spec of one tensor; KeyError if there is none."""
        return self._stored[name].spec

    def read(self, name: str, rows: slice = ALL) -> Block:
        import torch

        item = self._stored[name]
        spec = item.spec
        start, stop, _ = rows.indices(spec.rows)
        row_bytes = spec.row_numel * itemsize(spec.dtype)
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self._fill(item, buffer.numpy().data, start * row_bytes)
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        return Block(buffer.view(torch_dtype(spec.dtype)).view(shape))

    def _fill(self, item: StoredTensor, view: memoryview, offset: int) -> None:
        fd = self._fds.get(item.file)
        if fd is None:
            # Two threads may both open: one handle is then kept until close, which is harmless.
            fd = self._fds.setdefault(item.file, os.open(item.file, os.O_RDONLY | os.O_CLOEXEC))
        done = 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], item.offset + offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{item.file}: ends inside tensor {item.spec.name}", "the file is truncated: fetch it again"
                )
            done += count

    def close(self) -> None:
        """Release the handles. Safe twice."""
        fds = getattr(self, "_fds", {})  # not there where opening failed
        while fds:
            os.close(fds.popitem()[1])

    def __del__(self) -> None:
        self.close()


class Checkpoint(SafetensorsFiles):
    """A Hugging Face model directory, sharded or in one file. Opening it reads headers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        super().__init__(_index(path))


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a model directory."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model directory", "name a directory with config.json, or a Hub id")
    config = read_json(path / "config.json", "not a model directory (no config.json)")
    problems = [f"{path / 'config.json'}: {problem}" for problem in _config_problems(config)]
    raise_all(problems, lambda message: CheckpointError(message, "the file is damaged or malicious"))
    return config


def _config_problems(config: JsonObject) -> Iterator[str]:
    """What cannot be, of the keys by which everything else is chosen."""
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(_is_name(name) for name in named)):
        yield f"architectures: {repr(named)[:LONGEST_VALUE]}, expected a list of names"
    for part, content in (("", config), *((f"{key}.", config[key]) for key in PARTS if key in config)):
        if not isinstance(content, dict | None):
            yield f"{part.rstrip('.')}: {repr(content)[:LONGEST_VALUE]}, expected keys and values"
            continue
        for key, value in (content or {}).items():
            if key == "model_type" and not (value is None or _is_name(value)):
                yield f"{part}{key}: {repr(value)[:LONGEST_VALUE]}, expected a name"
            if key in COUNTS and isinstance(value, int) and value > MOST_LAYERS:
                yield f"{part}{key}: {repr(value)[:LONGEST_VALUE]}, expected {MOST_LAYERS} at most"


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) < LONGEST_WORD


def model_dtype(config: JsonObject) -> str | None:
    """``bfloat16`` and the like: ``dtype`` (transformers 5), ``torch_dtype`` (4), or the text part's."""
    for part in (config, config.get("text_config") or {}):
        dtype = part.get("dtype") or part.get("torch_dtype")
        if isinstance(dtype, str):
            return dtype.removeprefix("torch.")
    return None


def identity(path: Path, name: str | None = None, revision: str | None = None, content: bool = True) -> dict[str, Any]:
    """What a base is known by: id, revision, a hash of names and shapes, and its files' sha256.

    A base from the Hub's cache is known by its repository and the commit, whatever it was named by.
    ``content=False`` leaves the file hashes out (they read every byte once, about 2 GB/s).
    """
    pulled = hub_snapshot(path)
    checkpoint = Checkpoint(path)
    shapes = sorted(f"{s.name} {list(s.shape)}" for s in checkpoint.specs())
    shards = sorted({item.file for item in checkpoint._stored.values()})
    return {
        "path": str(path.resolve()),
        "id": pulled.id if pulled else name or str(path),
        "revision": pulled.commit if pulled else revision,
        "fingerprint": {
            "config": digest(path / "config.json")["sha256"],
            "tensors": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        },
        "files": {shard.name: content_hash(shard) for shard in shards} if content else {},
        "stat": {shard.name: [shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards} if content else {},
    }


def content_hash(path: Path) -> str:
    """sha256 of a file; the Hub's cache names its blobs by it, so a cached one need not be read."""
    blob = path.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else str(digest(path)["sha256"])


def _index(path: Path) -> list[StoredTensor]:
    if (path / INDEX).is_file():
        return _sharded(path, read_json(path / INDEX, "unreadable index").get("weight_map"))
    if (path / SINGLE).is_file():
        return read_header(inside(path, SINGLE))
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise CheckpointError(
            f"{path}: holds pickle weights only", "save them again with `save_pretrained(..., safe_serialization=True)`"
        )
    raise CheckpointError(f"{path}: no {INDEX} or {SINGLE}", "a base model is a directory of safetensors files")


def _sharded(path: Path, weight_map: Any) -> list[StoredTensor]:
    """The index and the shards' headers must say the same, in both directions."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: no weight_map")
    not_text = [
        f"{INDEX}: weight_map[{k!r}] is {v!r}, expected a file name"
        for k, v in weight_map.items()
        if not isinstance(v, str)
    ]
    raise_all(not_text)
    stored = [item for shard in dict.fromkeys(weight_map.values()) for item in read_header(inside(path, shard))]
    problems: list[str] = []
    seen: dict[str, str] = {}
    for item in stored:
        name = item.spec.name
        if name in seen:
            problems.append(f"{name}: in both {seen[name]} and {item.file.name}")
        seen[name] = item.file.name
        if weight_map.get(name) != item.file.name:
            problems.append(f"{name}: is in {item.file.name}, but the index says {weight_map.get(name, 'nothing')}")
    problems += [
        f"{name}: the index names {shard}, which has no such tensor"
        for name, shard in weight_map.items()
        if name not in seen
    ]
    raise_all([f"{INDEX}: {problem}" for problem in problems])
    return stored


def read_header(path: Path) -> list[StoredTensor]:
    """Every tensor of one safetensors file, in file order; an error if the header lies in any way."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_SIZE, size - 8):
            raise CheckpointError(
                f"{path}: header of {length} bytes in a file of {size}",
                "the file is truncated, or not a safetensors file",
            )
        raw = file.read(length)
    try:
        if raw[:1] != b"{":
            raise ValueError("does not start with {")
        header = json.loads(raw, object_pairs_hook=without_repeated)
        header.pop("__metadata__", None)
        stored = [_entry(path, name, value, 8 + length) for name, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: bad header: {str(error)[:200]}", "the file is damaged: fetch it again"
        ) from None
    stored.sort(key=lambda item: (item.offset, item.spec.nbytes))
    end = 8 + length
    for item in stored:
        if item.offset != end:
            raise CheckpointError(f"{path}: tensor {item.spec.name} starts at byte {item.offset}, expected {end}")
        end += item.spec.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: {size} bytes, expected {end}", "the file is truncated, or was appended to: fetch it again"
        )
    return stored


def _entry(path: Path, name: str, value: dict[str, Any], data_start: int) -> StoredTensor:
    shape, dtype, (start, stop) = value["shape"], value["dtype"], value["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in [*shape, start, stop]):
        raise ValueError(f"{name}: shape {shape} or offsets {[start, stop]} are not whole numbers")
    spec = TensorSpec(name, tuple(shape), dtype)
    if stop - start != spec.nbytes:
        raise ValueError(f"{name}: {stop - start} bytes, expected {spec.nbytes} for {dtype} {shape}")
    return StoredTensor(spec, path, data_start + start)
