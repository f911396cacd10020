"""An export made again, byte by byte, against what lies on the disk: its own sink, with files that compare.

Nothing is written. Tensors are told apart by the headers, the planned one and the stored one, so that other keys in a
file (a template that the user changed) move no tensor away from its twin.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.staging import DryRunDir, NullFile, StagedDir, StagedFile
from lora2serve.exporting import sinks, stream
from lora2serve.exporting.sinks import ExportModel
from lora2serve.exporting.stored_tensors import HEADER_READERS, TensorBytes, read_header, read_tensors
from lora2serve.progress import Advance, Silent, Unit


@dataclass
class DifferentBytes:
    """What is different in one tensor."""

    tensor: str
    differing: int = 0
    of: int = 0
    first_row: int = 0

    def __str__(self) -> str:
        return f"{self.tensor}: {self.differing} of {self.of} bytes are not the planned ones, from row {self.first_row}"


@dataclass
class ExactComparison:
    """``compared``: tensors; ``names``, ``kinds``: what is there and not planned or the other way round, and what is
    stored in another type or shape, in words; ``different``: tensors whose bytes are not the planned ones.
    """

    compared: int = 0
    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    coarser: bool = False  # a type of fewer bytes than planned
    different: dict[str, DifferentBytes] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether every byte is as planned."""
        return not (self.names or self.kinds or self.different)


def compare_exactly(
    export: Path, manifest: Manifest, model: ExportModel, options: Any, advance: Callable[[int], None]
) -> ExactComparison:
    """Make the export again with these options of its target; raises what the export itself would be refused with."""
    with ExitStack() as stack:
        stored = StoredFiles(export)
        stack.callback(stored.close)
        out = ComparedDir(export, stored)
        stack.callback(out.discard)
        sink = sinks.find(manifest.target)(model, out, options)
        stack.callback(sink.close)
        stream.feed(model, [sink], _Forwarded(advance), stream.threads_for(None))
        if not sink.wanted:  # an adapter's, which is written at the end
            sink.finish()
        return stored.result()


class StoredFiles:
    """The tensors of an export as they lie there, from all of its files, and what was found of each."""

    def __init__(self, export: Path) -> None:
        self._handles: dict[Path, int] = {}
        self.tensors: dict[str, tuple[TensorBytes, int]] = {}
        self.twice: list[str] = []
        self._planned: dict[str, TensorBytes] = {}
        self._seen: dict[str, int] = {}  # bytes compared
        self._found = ExactComparison()
        self._lock = Lock()
        for path in sorted(path for path in export.rglob("*") if path.suffix in HEADER_READERS):
            handle = self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            for tensor in read_tensors(path):
                if tensor.name in self.tensors:
                    self.twice.append(tensor.name)
                self.tensors[tensor.name] = (tensor, handle)

    def plan(self, tensors: Sequence[TensorBytes]) -> None:
        """Take a planned header."""
        for planned in tensors:
            self._planned[planned.name] = planned
            found = self.tensors.get(planned.name)
            if found and (found[0].type, found[0].shape) != (planned.type, planned.shape):
                self._found.kinds.append(f"{planned.name}: stored as {found[0].kind}, planned as {planned.kind}")
                self._found.coarser |= found[0].nbytes < planned.nbytes

    def compare(self, planned: TensorBytes, at: int, data: memoryview) -> None:
        """Planned bytes of one tensor, from byte ``at`` of its data on; beyond its end it is padding."""
        found = self.tensors.get(planned.name)
        with self._lock:
            self._seen[planned.name] = self._seen.get(planned.name, 0) + len(data) * (at < planned.nbytes)
        if found is None or found[0].nbytes != planned.nbytes:
            return
        tensor, handle = found
        stored = np.frombuffer(_read(handle, tensor.start + at, len(data)), dtype=np.uint8)
        expected = np.frombuffer(data, dtype=np.uint8)[: len(stored)]
        differing = np.flatnonzero(stored != expected)
        missing = len(data) - len(stored)
        if len(differing) or missing:
            self._record(planned, at + (int(differing[0]) if len(differing) else len(stored)), len(differing) + missing)

    def result(self) -> ExactComparison:
        """Once every planned byte was handed over."""
        found, stored, planned = self._found, self.tensors.keys(), self._planned
        found.compared = len(planned)
        found.names = [f"{name}: missing" for name in sorted(planned.keys() - stored)]
        found.names += [f"{name}: not planned" for name in sorted(stored - planned.keys())]
        found.names += [f"{name}: stored twice" for name in sorted(self.twice)]
        short = [name for name, tensor in planned.items() if self._seen.get(name, 0) != tensor.nbytes]
        if short:
            raise AssertionError(f"{short[0]}: {self._seen.get(short[0], 0)} bytes compared")
        return found

    def close(self) -> None:
        """Release the files."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _record(self, planned: TensorBytes, byte: int, differing: int) -> None:
        row = planned.row_of(min(byte, planned.nbytes - 1))
        with self._lock:
            known = self._found.different.get(planned.name)
            if known is None:
                known = self._found.different[planned.name] = DifferentBytes(
                    planned.name, 0, planned.nbytes, first_row=row
                )
            known.differing += differing
            known.first_row = min(known.first_row, row)


class ComparedDir(DryRunDir):
    """An output whose tensors are compared; what lies beside them is for the settings gate."""

    to_serve: ClassVar[bool] = False

    def __init__(self, target: Path, stored: StoredFiles) -> None:
        super().__init__(target)
        self._stored = stored

    def file(self, name: str, size: int) -> StagedFile:
        return ComparedFile(self.path / name, size, self._stored)

    def subdir(self, name: str) -> StagedDir:
        raise AssertionError(f"{name}: an export that is made in two steps is not made again")


class ComparedFile(NullFile):
    """A file that takes planned bytes, its header first, and compares them."""

    def __init__(self, path: Path, size: int, stored: StoredFiles) -> None:
        super().__init__(path, size)
        self._stored = stored
        self._tensors: Sequence[TensorBytes] = ()
        self._starts: list[int] = []

    def pwrite(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data).cast("B")
        if offset == 0:
            self._tensors = read_header(self.path, bytes(view))
            self._starts = [tensor.start for tensor in self._tensors]
            self._stored.plan(self._tensors)
            first = self._starts[0] if self._starts else len(view)
            view, offset = view[first:], min(first, offset + len(view))
        while view:
            number = bisect_right(self._starts, offset) - 1
            end = self._starts[number + 1] if number + 1 < len(self._starts) else self.size
            part = view[: end - offset]
            self._stored.compare(self._tensors[number], offset - self._starts[number], part)
            view, offset = view[len(part) :], offset + len(part)


class _Forwarded(Silent):
    """Progress that goes to one callback, from one thread at a time."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._lock = advance, Lock()

    @contextmanager
    def track(self, label: str, total: int, unit: Unit = "") -> Iterator[Advance]:
        def advance(amount: int, status: str = "") -> None:
            with self._lock:
                self._advance(amount)

        yield advance


def _read(handle: int, offset: int, count: int) -> bytes:
    """Bytes of a file, fewer where it ends."""
    parts = []
    while count and (part := os.pread(handle, count, offset)):
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
