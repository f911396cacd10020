"""A GGUF file as a value: every key and every tensor, known before the first byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from converters.gguf import header, presets
from converters.gguf.gguf_layout import Backend
from converters.gguf.header import GgufTensor, Keys, TypedValue
from converters.gguf.imatrix import Imatrix
from converters.gguf.llama.llama_process import Llama


@dataclass(frozen=True)
class GgufPlan:
    """Made by ``plan_file``, then proven by tokenizer_check.py, allocated by shards.py and filled by gguf_writer.py."""

    keys: Keys  # the vocabulary among them
    tensors: tuple[GgufTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data; made once, for the proof and for the file: a vocabulary takes its time."""
        return header.encode(self.keys, self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.padded for tensor in self.tensors)

    def ending_with(self, token: int) -> GgufPlan:
        """The same with one more token that ends an answer: of a turn, or of a message where that has another."""
        from gguf import GGUFValueType

        names = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
        free = next((name for name in names if name not in self.keys), None)
        if free is None or token in [self.keys[name].value for name in names if name in self.keys]:
            return self
        return replace(self, keys={**self.keys, free: TypedValue(token, int(GGUFValueType.UINT32))})

    def write_empty(self, path: Path) -> None:
        """The whole file, its tensors' data left out (a hole on the disk)."""
        with path.open("wb") as file:
            file.write(self.header)
            file.truncate(self.size)

    def split(self, most: int | None) -> list[GgufPlan]:
        """The files of at most so many bytes of tensor data; a larger tensor has a file of its own.

        Only the first carries the keys; each says which of how many it is.
        """
        groups = _group(self.tensors, most)
        if len(groups) == 1:
            return [self]
        return [
            GgufPlan(
                {**({} if number else self.keys), **_shard_keys(number, len(groups), len(self.tensors))}, tuple(group)
            )
            for number, group in enumerate(groups)
        ]


def plan_file(
    backend: Backend, llama: Llama, imatrix: Imatrix | None = None, overrides: Sequence[str] = ()
) -> GgufPlan:
    """The file that a backend lays out, with a type for each tensor; ExportError for what llama.cpp would refuse."""
    keys = {**backend.keys(), **(header.typed(imatrix.keys()) if imatrix else {})}
    chosen = presets.choose(backend.preset, backend.tensors, keys, llama, imatrix)
    types = presets.override(chosen, overrides)
    presets.require_imatrix(types, imatrix)
    presets.require_whole_blocks(types, {tensor.name: tensor.shape for tensor in backend.tensors})
    return GgufPlan(
        keys, tuple(GgufTensor(tensor.name, tensor.shape, types[tensor.name]) for tensor in backend.tensors)
    )


def _shard_keys(number: int, count: int, tensors: int) -> dict[str, TypedValue]:
    from gguf import GGUFValueType

    return {
        "split.no": TypedValue(number, int(GGUFValueType.UINT16)),
        "split.count": TypedValue(count, int(GGUFValueType.UINT16)),
        "split.tensors.count": TypedValue(tensors, int(GGUFValueType.INT32)),
    }


def _group(tensors: Sequence[GgufTensor], most: int | None) -> list[list[GgufTensor]]:
    groups: list[list[GgufTensor]] = [[]]
    total = 0
    for tensor in tensors:
        if most and groups[-1] and total + tensor.padded > most:
            groups.append([])
            total = 0
        groups[-1].append(tensor)
        total += tensor.padded
    return groups
