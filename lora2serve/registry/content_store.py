"""The bytes of all versions by their sha256: files in a folder, or objects at a URL that fsspec opens.

A blob is there whole or not at all, and it is there before the database names it. Files that are only ever replaced by
a rename (exports) share their bytes with the folder they come from by hard links; the others are copied.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from lora2serve.errors import RegistryError, UsageError, first_line
from lora2serve.system import scratch
from lora2serve.system.http import without_credentials
from lora2serve.system.small_files import digest, file_mode, sync_to_disk

BLOBS, PARTIAL = "blobs", "partial"
SHA256 = re.compile(r"[0-9a-f]{64}")
READ_BYTES = 1 << 22
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
NO_WRITE = (errno.EROFS, errno.EACCES)
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)


@dataclass(frozen=True)
class Blob:
    """The content of one file."""

    sha256: str
    size: int  # bytes


class ContentStore(Protocol):
    """Blobs by their sha256."""

    def put(self, file: Path, *, link: bool) -> Blob:
        """Add a file's content; ``link``: it will not change, and may be shared. OSError where there is no room."""
        ...

    def get(self, blob: Blob, target: Path, *, link: bool = True) -> None:
        """Make ``target`` of a blob; ``link``: it will not be written to, and may be a hard link.

        RegistryError where the blob is missing or damaged.
        """
        ...

    def problem(self, blob: Blob) -> str:
        """What is wrong with a blob after reading all of it, or an empty string."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Every blob that is there, sha256 -> bytes."""
        ...

    def remove(self, sha256: str) -> None:
        """Remove a blob."""
        ...


class FolderStore:
    """``blobs/ab/<sha256>`` in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mended: set[str] = set()  # blobs that were damaged, and were put again

    def put(self, file: Path, *, link: bool) -> Blob:
        with staged(self.root) as folder:
            new = folder / "new"
            _link_or_copy(file, new, link)
            blob = Blob(digest(new)["sha256"], new.stat().st_size)
            path = self._path(blob.sha256)
            if path.is_file():
                if path.samefile(new) or digest(path)["sha256"] == blob.sha256:
                    return blob
                self.mended.add(blob.sha256)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(new, path)
            sync_to_disk(path.parent)
            return blob

    def get(self, blob: Blob, target: Path, *, link: bool = True) -> None:
        path = self._path(blob.sha256)
        if not path.is_file() or path.stat().st_size != blob.size:
            raise _damaged(blob, "missing" if not path.is_file() else f"{path.stat().st_size} bytes")
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            _link_or_copy(path, target, True)
        else:
            shutil.copyfile(path, target)

    def problem(self, blob: Blob) -> str:
        path = self._path(blob.sha256)
        if not path.is_file():
            return "missing"
        return "" if digest(path)["sha256"] == blob.sha256 else "content changed (sha256 differs)"

    def sizes(self) -> Mapping[str, int]:
        paths = (path for path in (self.root / BLOBS).glob("??/*") if SHA256.fullmatch(path.name))
        return {path.name: path.stat().st_size for path in paths}

    def remove(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)
        with suppress(OSError):  # it holds others
            self._path(sha256).parent.rmdir()

    def _path(self, sha256: str) -> Path:
        return self.root / BLOBS / sha256[:2] / sha256


class UrlStore:
    """``<url>/blobs/ab/<sha256>`` in whatever fsspec opens: s3://, gs://, sftp://, file:// ..."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._files, path = fsspec.core.url_to_fs(url)
            self._root = str(path).rstrip("/")
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{without_credentials(url)}: {first_line(error)}",
                "a folder, or a URL whose package of fsspec is installed",
            ) from None

    def put(self, file: Path, *, link: bool) -> Blob:
        blob = Blob(**digest(file))
        path = self._path(blob.sha256)
        with self._errors():
            self._files.invalidate_cache()  # another process may have removed what was there
            if not (self._files.exists(path) and self._files.info(path)["size"] == blob.size):
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(file), path)
        return blob

    def get(self, blob: Blob, target: Path, *, link: bool = True) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._errors():
                self._files.get_file(self._path(blob.sha256), str(target))
        except FileNotFoundError:
            raise _damaged(blob, "missing") from None
        if digest(target)["sha256"] != blob.sha256:
            target.unlink()
            raise _damaged(blob, "content changed (sha256 differs)")

    def problem(self, blob: Blob) -> str:
        sha256 = hashlib.sha256()
        try:
            with self._errors(), self._files.open(self._path(blob.sha256), "rb") as file:
                while block := file.read(READ_BYTES):
                    sha256.update(block)
        except FileNotFoundError:
            return "missing"
        return "" if sha256.hexdigest() == blob.sha256 else "content changed (sha256 differs)"

    def sizes(self) -> Mapping[str, int]:
        folder = f"{self._root}/{BLOBS}"
        with self._errors():
            self._files.invalidate_cache()
            there = self._files.find(folder, detail=True) if self._files.exists(folder) else {}
        names = {path.rpartition("/")[2]: int(facts["size"]) for path, facts in there.items()}
        return {name: size for name, size in names.items() if SHA256.fullmatch(name)}

    def remove(self, sha256: str) -> None:
        with suppress(FileNotFoundError), self._errors():
            self._files.rm_file(self._path(sha256))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Each service has errors of its own, of any class; what is missing, or this disk full, is for the caller."""
        try:
            yield
        except Exception as error:
            if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in NO_ROOM):
                raise
            raise RegistryError(
                f"{without_credentials(self.url)}: {first_line(error)}",
                "see that it can be reached, and that its keys are set",
            ) from None

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{BLOBS}/{sha256[:2]}/{sha256}"


def open_store(content: str) -> ContentStore:
    """The store in a folder or at a URL."""
    return UrlStore(content) if "://" in content else FolderStore(Path(content))


@contextmanager
def staged(root: Path) -> Iterator[Path]:
    """A folder on the file system of ``root`` for what is not whole yet; the next command removes a killed one's."""
    folder = root / PARTIAL / uuid4().hex
    with scratch.claimed(folder):
        folder.mkdir(parents=True)
        yield folder


@contextmanager
def folder_lock(root: Path, name: str, *, alone: bool) -> Iterator[None]:
    """The lock of that name in a folder; ``alone``: nobody else holds it, and the folder may be written to."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(root / name, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if alone or error.errno not in NO_WRITE:
            raise
        descriptor = os.open(root / name, flags | os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
    shutil.copyfile(source, target)
    target.chmod(file_mode() & 0o444)
    sync_to_disk(target)


def _damaged(blob: Blob, reason: str) -> RegistryError:
    return RegistryError(
        f"content {blob.sha256[:12]} of the registry: {reason}, expected {blob.size} bytes",
        "`lora2serve registry verify` names all that is damaged",
    )
