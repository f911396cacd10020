"""One target directory that several processes fill at the same time, and one of them publishes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.staging import READ_BYTES, StagedDir, StagedFile, allocate
from lora2serve.errors import ExportError
from lora2serve.system.hardware import cores

SUFFIX = ".shards"  # of the folder beside a target, in which it is made


class SharedFile(StagedFile):
    """A file of a known size whose bytes come from several processes: each writes the same ones, or others.

    What is written before ``begin`` is kept in memory: headers, and values that come from no weight.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.written = 0  # bytes, by this process since ``begin``
        self.constant = 0  # bytes before, which every process writes
        self._fd, self._known = -1, ""
        self._first: list[tuple[bytes, int]] = []
        self._counting = Lock()

    def begin(self) -> None:
        """Claim the disk, where no other process has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if os.fstat(self._fd).st_size != self.size:
            allocate(self._fd, self.size)
        for data, offset in self._first:
            self._put(memoryview(data), offset)
        self._first.clear()

    def pwrite(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data).cast("B")
        if offset + len(view) > self.size:
            raise ExportError(f"{self.path.name}: {offset + len(view)} bytes written, expected {self.size}")
        if self._fd < 0:
            self._first.append((bytes(view), offset))
            self.constant += len(view)
            return
        self._put(view, offset)
        with self._counting:
            self.written += len(view)

    def _put(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)

    def sync(self) -> None:
        """What this process has written is on the disk, for the others to see."""
        os.fsync(self._fd)

    def finish(self) -> str:
        """The file's sha256, read from the disk once: most of it is of other processes."""
        if not self._known:
            sha256 = hashlib.sha256()
            with self.path.open("rb", buffering=0) as file:
                while block := file.read(READ_BYTES):
                    sha256.update(block)
            self._known = sha256.hexdigest()
        return self._known

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SharedDir(StagedDir):
    """Large files are shared; small ones are written by the process that seals it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(target.name + SUFFIX)
        self.path = self.folder / "files"
        self._files: dict[str, StagedFile] = {}
        self._small: dict[str, bytes] = {}

    @property
    def files(self) -> Mapping[str, SharedFile]:
        """The large ones by name."""
        return {name: file for name, file in self._files.items() if isinstance(file, SharedFile)}

    def file(self, name: str, size: int) -> StagedFile:
        opened = SharedFile(self.path / name, size)
        self._files[name] = opened
        return opened

    def bytes(self, name: str, content: bytes) -> None:
        self._small[name] = content

    def begin(self) -> None:
        """Make it, where no other process has."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self.files.values():
            file.begin()

    def seal(self, record: Manifest) -> Manifest:
        """See ``StagedDir``; the hashes of several files are taken at once."""
        for name, content in self._small.items():
            self._path_of(name).write_bytes(content)
        with ThreadPoolExecutor(min(8, cores())) as pool:
            list(pool.map(SharedFile.finish, self.files.values()))
        return super().seal(record)

    def close(self) -> None:
        """Release the handles; what is written stays for whoever goes on."""
        for file in self._files.values():
            file.close()
