"""A directory that appears whole or not at all.

Everything is written into ``<target>.partial-<id>`` beside the target; ``publish`` syncs it, writes the
manifest last and swaps it in by one rename. A killed run leaves the old directory, or the new one, and
at most a partial directory, which the next command of any kind removes.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lora2serve.artifacts import manifest
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import FileEntry, Manifest
from lora2serve.errors import ExportError
from lora2serve.system import file_lock, scratch
from lora2serve.system.small_files import digest, plain_path, sync_to_disk

READ_BYTES = 4 << 20  # bytes read back at a time while hashing
UNHASHED_BYTES = 4 << 20  # bytes of one file that wait in memory to be hashed
FLUSH = 64 << 20  # bytes that are sent to the disk together
_AT_FDCWD, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 2, 2  # linux/fcntl.h, linux/fs.h


def as_json(content: Any) -> bytes:
    """A small JSON file, indented."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


class StagedFile:
    """One file of a known size, written at any offset from any thread, hashed behind the writers.

    The hash needs the pieces in file order: whichever thread finds nobody hashing takes the next ones, from memory
    while they are there (``UNHASHED_BYTES`` at most), else back from the page cache. Written pieces start on their
    way to the disk behind the hash, so that little is left for the sync at the end.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o666)
        self._lock = threading.Lock()
        self._hashing = threading.Lock()
        self._pieces: dict[int, tuple[int, memoryview | None]] = {}  # start -> end, and the bytes if still kept
        self._unhashed = self._hashed = self._flushed = 0
        self._sha256 = hashlib.sha256()
        allocate(self._fd, size)

    def pwrite(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of ``data`` at ``offset``. It must stay as it is from here on; pieces must not overlap."""
        view = memoryview(data).cast("B")
        end = offset + len(view)
        if end > self.size:
            raise ExportError(f"{self.path.name}: {end} bytes written, expected {self.size}")
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)
        with self._lock:
            keep = self._unhashed + len(view) <= UNHASHED_BYTES
            self._unhashed += len(view) * keep
            self._pieces[offset] = (end, view if keep else None)
        if self._hashing.acquire(blocking=False):
            try:
                self._hash()
            finally:
                self._hashing.release()

    def finish(self) -> str:
        """The file's sha256, after a sync; an error if a planned byte was never written."""
        with self._hashing:
            self._hash()
        if self._hashed != self.size:
            raise ExportError(f"{self.path.name}: byte {self._hashed} of {self.size} was never written")
        os.fsync(self._fd)
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Release the handle. Safe twice."""
        self._pieces.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hash(self) -> None:
        """Hash on, piece by piece, up to the first that is not written yet."""
        while True:
            with self._lock:
                end, view = self._pieces.pop(self._hashed, (0, None))
                self._unhashed -= len(view) if view is not None else 0
            if view is not None:
                self._sha256.update(view)
            elif end:
                self._hash_back(end)
            else:
                return
            self._hashed = end
            if end - self._flushed >= FLUSH:
                _start_writing(self._fd, self._flushed, end - self._flushed)
                self._flushed = end

    def _hash_back(self, end: int) -> None:
        for start in range(self._hashed, end, READ_BYTES):
            self._sha256.update(os.pread(self._fd, min(READ_BYTES, end - start), start))


class StagedDir:
    """One target directory under construction."""

    to_serve: ClassVar[bool] = True  # whether engines will open what is written here

    def __init__(self, target: Path, path: Path | None = None) -> None:
        self.target = target
        self.path = path or partial_of(target)
        self.path.mkdir(mode=0o777)
        self._files: dict[str, StagedFile] = {}

    def file(self, name: str, size: int) -> StagedFile:
        """A large file of exactly ``size`` bytes, to be filled by ``pwrite``."""
        opened = StagedFile(self._path_of(name), size)
        self._files[name] = opened
        return opened

    def subdir(self, name: str) -> StagedDir:
        """An output of its own in here, for what only the making needs; its maker removes it."""
        return StagedDir(self.path / name)

    def text(self, name: str, content: str) -> None:
        """A small UTF-8 text file."""
        self.bytes(name, content.encode())

    def json(self, name: str, content: Any) -> None:
        """A small JSON file, indented."""
        self.bytes(name, as_json(content))

    def bytes(self, name: str, content: bytes) -> None:
        """A small binary file."""
        with self._path_of(name).open("xb") as file:
            file.write(content)

    def copy(self, name: str, source: Path) -> None:
        """A side file as it is (the bytes, not the link or the mode)."""
        self.bytes(name, source.read_bytes())

    def publish(self, record: Manifest) -> Export:
        """``seal`` and ``swap``."""
        sealed = self.seal(record)
        return Export(self.swap(), sealed)

    def seal(self, record: Manifest) -> Manifest:
        """Sync every file, and write the manifest last: all that can still fail for want of disk.

        The manifest as it is written, with every file in it.
        """
        sums = {name: FileEntry(file.finish(), file.size) for name, file in self._files.items()}
        for file in self._files.values():
            file.close()
        for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
            name = path.relative_to(self.path).as_posix()
            if name not in sums and path.name != manifest.NAME:
                sync_to_disk(path)
                sums[name] = FileEntry.from_json(digest(path), name)
        sealed = replace(record, files=dict(sorted(sums.items())))
        sealed.write(self.path)
        sync_to_disk(self.path / manifest.NAME)
        for folder in [*(p for p in self.path.rglob("*") if p.is_dir()), self.path]:
            sync_to_disk(folder)
        return sealed

    def swap(self) -> Path:
        """Rename the sealed directory into its place."""
        _swap(self.path, self.target)
        sync_to_disk(self.target.parent)
        return self.target

    def discard(self) -> None:
        """Remove what is not published. Safe after ``publish`` (then it removes what was replaced)."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _path_of(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class DryRunDir(StagedDir):
    """An output that only adds up what would be written: for ``--dry-run``."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = Path(tempfile.mkdtemp(prefix="plan-", dir=scratch.root()))
        self._files = {}
        self.sizes: dict[str, int] = {}  # of what is published
        self.passing: dict[str, int] = {}  # of what is only needed on the way, which takes disk too

    def file(self, name: str, size: int) -> StagedFile:
        self.sizes[name] = size
        return NullFile(self.path / name, size)

    def subdir(self, name: str) -> StagedDir:
        nested = DryRunDir(self.target / name)
        nested.sizes = self.passing
        return nested


class NullFile(StagedFile):
    """A file that is never there."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self._fd = path, size, -1

    def pwrite(self, data: memoryview | bytes, offset: int) -> None:
        pass


@contextmanager
def opened(target: Path, *, overwrite: bool) -> Iterator[StagedDir]:
    """An ``StagedDir`` for ``target`` under its lock; what is not published is removed on the way out."""
    target = plain_path(target.absolute())
    partial = partial_of(target)
    with _folder_of(target), scratch.claimed(partial, _lock_of(target)), _locked(target):
        for stale in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        _refuse_existing(target, overwrite)
        output = StagedDir(target, partial)
        try:
            yield output
        finally:
            output.discard()


@contextmanager
def claimed_target(target: Path, *, overwrite: bool) -> Iterator[None]:
    """Nobody else writes there meanwhile, and what stands there may be replaced; ExportError otherwise."""
    with _locked(target):
        _refuse_existing(target, overwrite)
        yield


def partial_of(target: Path) -> Path:
    """A new name beside a target, for what is not published yet."""
    return target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:12]}")


@contextmanager
def _folder_of(target: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(scratch.filled(target.parent))
        except OSError as error:
            raise ExportError(f"{target.parent}: {error.strerror}", "choose another directory with -o") from None
        yield


def refuse(target: Path, *, overwrite: bool) -> None:
    """ExportError where ``opened`` would not take ``target``, as far as that is known now; leaves nothing there."""
    target = plain_path(target.absolute())
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    try:
        scratch.try_folder(folder)
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be made in {folder}: {error.strerror}", "choose another directory with -o"
        ) from None
    _refuse_existing(target, overwrite)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target}: exists and is not a directory", "choose another directory with -o")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / manifest.NAME).exists():
        raise ExportError(
            f"{target}: holds files that are not an export of lora2serve", "choose another directory with -o"
        )
    if not overwrite:
        raise ExportError(f"{target}: already exists", "--overwrite replaces it, once the new one is complete")


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock.locked(_lock_of(target)))
        except BlockingIOError:
            raise ExportError(
                f"{target}: another run is writing there", "wait for it, or choose another directory with -o"
            ) from None
        except OSError as error:  # a link there (ELOOP), or a directory that takes no files
            raise ExportError(f"{_lock_of(target)}: {error.strerror}", "choose another directory with -o") from None
        yield


def allocate(fd: int, size: int) -> None:
    """Claim the disk now, so that a full one is met before the work and not after it."""
    if not size:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def _start_writing(fd: int, offset: int, count: int) -> None:
    """Ask the kernel to begin with those dirty pages (sync_file_range(2)); where it cannot, the sync does it all."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin:
        begin(fd, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def _swap(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; where a target stands, exchange the two in one step (renameat2(2))."""
    if not target.exists():
        os.rename(new, target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    exchange = getattr(libc, "renameat2", None)
    if exchange and not exchange(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE):
        return
    # No exchange on this file system: for a moment the name is free, never half of each.
    old = target.with_name(f"{target.name}.partial-old-{uuid.uuid4().hex[:8]}")
    os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)
