"""What goes up: exactly the files that an export's manifest names, read once, checked and scanned.

Several exports may share one repository (all GGUF types of a model, say). Files that are the same in each are
sent once; a side file whose content differs gets its export's quant into its name.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import FileEntry, Manifest
from lora2serve.errors import InputError, UsageError
from lora2serve.hub.secret_scan import LONGEST_SECRET, find_secret
from lora2serve.progress import Progress

READ_BYTES = 4 << 20
IN_MEMORY = 1 << 20  # a file up to this size is sent from the bytes that were checked
WEIGHTS = (".safetensors", ".gguf", ".bin", ".imatrix", ".dat")
CARD = "README.md"
LOCAL = ("use",)  # what a manifest says for this machine only


@dataclass(frozen=True)
class UploadItem:
    """One file to send: ``source`` is its bytes, or the path of a large one."""

    path: str  # in the repository
    source: Path | bytes
    size: int
    sha256: str
    git: str  # sha1 of the git blob, which the Hub shows for small files


@dataclass
class Package:
    """What one repository gets. ``items`` are the exports' files; card and manifest come on top."""

    repo_id: str
    exports: list[Export]
    items: dict[str, UploadItem] = field(default_factory=dict)
    placed: dict[str, dict[str, str]] = field(default_factory=dict)  # export name -> its file -> path in the repository
    reports: dict[str, list[UploadItem]] = field(default_factory=dict)  # export name -> its published parity report


def open_export(path: Path) -> Export:
    """The export at ``path``; an error if it is none, or a bundle."""
    export = Export.open(path)
    if export.manifest.bundle:
        raise UsageError(f"{path}: a bundle of adapters", "push them one by one, each is an export in its adapters/")
    return export


def package(
    repo_id: str,
    exports: Sequence[Export],
    progress: Progress,
    folders: Mapping[str, str],
    staying: Sequence[Manifest],
) -> Package:
    """Read, check and scan every file of ``exports``.

    ``folders`` maps a target to its folder in the repository, ``staying`` are the manifests of exports that are
    there already and stay.

    Raises InputError with everything that is wrong at once: a file that is missing, changed, a symbolic link,
    Python code, or that holds something shaped like a token.
    """
    package = Package(repo_id, list(exports))
    problems: list[str] = []
    taken = {name: entry.sha256 for manifest in staying for name, entry in manifest.files.items()}
    with progress.track("verify", sum(export.bytes for export in exports), "bytes") as advance:
        for export in exports:
            placed = package.placed[export.name] = {}
            for name, expected in export.manifest.files.items():
                if name == CARD:
                    continue
                item, problem = _read(export.path, name, expected)
                advance(expected.size)
                if item is None:
                    problems.append(f"{export.path / name}: {problem}")
                    continue
                item = _assign_path(taken, item, folders.get(export.target, ""), export)
                taken[item.path] = item.sha256
                package.items[item.path] = item
                placed[name] = item.path
    if problems:
        raise InputError("\n".join(problems), "nothing was sent; export again, then push")
    return package


def _read(root: Path, name: str, expected: FileEntry) -> tuple[UploadItem | None, str]:
    """The file as an item, or None and what is wrong with it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or name.startswith(".git"):
        return None, "its manifest names a path outside the export"
    if pure.suffix == ".py":
        return None, "Python code is never pushed"
    path = root / name
    if any((root.joinpath(*pure.parts[:depth])).is_symlink() for depth in range(1, len(pure.parts) + 1)):
        return None, "a symbolic link, expected a file"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
    except OSError as error:
        return None, "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None, "not a regular file"
        if status.st_size != expected.size:
            return None, f"{status.st_size} bytes, expected {expected.size}"
        return _hash_and_scan(path, name, _chunks(file), status.st_size, expected.sha256)


def _hash_and_scan(
    path: Path, name: str, chunks: Iterator[bytes], size: int, sha256: str
) -> tuple[UploadItem | None, str]:
    digest, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    content, tail, scanned = b"", b"", 0
    for chunk in chunks:
        digest.update(chunk)
        git.update(chunk)
        if size <= IN_MEMORY:
            content += chunk
        if not name.endswith(WEIGHTS) or scanned < 4 * READ_BYTES:  # of weights, the header
            if secret := find_secret(tail + chunk):
                return None, f"holds something shaped like {secret}"
            tail, scanned = chunk[-LONGEST_SECRET:], scanned + len(chunk)
    if digest.hexdigest() != sha256:
        return None, "content changed since the export (sha256 differs)"
    return UploadItem(name, content if size <= IN_MEMORY else path, size, sha256, git.hexdigest()), ""


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(READ_BYTES):
        yield chunk


def _assign_path(taken: Mapping[str, str], item: UploadItem, folder: str, export: Export) -> UploadItem:
    """The item where it goes in the repository; beside another of that name only if one of them is a side file."""
    # LM Studio's two folders are for its own disk: in a repository the file lies at the top, where engines look.
    inner = PurePosixPath(item.path).name if export.target == "lmstudio" else item.path
    path = f"{folder}/{inner}" if folder else inner
    if taken.get(path, item.sha256) != item.sha256:
        if item.path.endswith((*WEIGHTS, "config.json", "index.json")):
            raise UsageError(
                f"{export.path}: its {path} differs from that of another export, so they cannot share a repository",
                "push one of them, or each with its own --repo-id",
            )
        pure = PurePosixPath(path)
        path = str(pure.with_name(f"{pure.stem}-{export.quant or export.target}{pure.suffix}"))
    return UploadItem(path, item.source, item.size, item.sha256, item.git)


def text_item(path: str, text: str) -> UploadItem:
    """A file that push itself wrote."""
    if secret := find_secret(text.encode()):
        raise InputError(f"{path}: holds something shaped like {secret}", "nothing was sent; remove it")
    data = text.encode()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return UploadItem(path, data, len(data), hashlib.sha256(data).hexdigest(), git)


def repository_manifest(package: Package, staying: Sequence[Manifest]) -> Manifest:
    """``lora2serve.json`` of the repository, with the exports that stay there: see ``union``."""
    pushed = {export.name: _published(package, export) for export in package.exports}
    if not staying:
        return union(pushed)
    both = pushed | {manifest.export_name: manifest for manifest in staying}
    return union(dict(sorted(both.items())))


def union(exports: Mapping[str, Manifest]) -> Manifest:
    """The manifest of one export as it is; of several what is the same in each, and each under ``exports``."""
    first, *others = exports.values()
    if not others:
        return first
    rest = [manifest.to_json() for manifest in others]
    same = {key: value for key, value in first.to_json().items() if all(other.get(key) == value for other in rest)}
    files = {name: entry.to_json() for manifest in exports.values() for name, entry in manifest.files.items()}
    each = {name: manifest.to_json() for name, manifest in exports.items()}
    return Manifest.from_json({**same, "exports": each, "files": dict(sorted(files.items()))})


def _published(package: Package, export: Export) -> Manifest:
    """The manifest as others may read it: with the files as they lie in the repository, and the report's."""
    placed = package.placed[export.name]
    files = {placed[name]: entry for name, entry in export.manifest.files.items() if name in placed}
    files |= {item.path: FileEntry(item.sha256, item.size) for item in package.reports.get(export.name, [])}
    content = {key: value for key, value in export.manifest.to_json().items() if key not in LOCAL}
    return replace(Manifest.from_json(public(content)), files=dict(sorted(files.items())))


def public(value: object) -> object:
    """A manifest or recipe as others may read it: absolute paths of this machine cut to their last part."""
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items() if key != "stat"}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value:
        return PurePosixPath(value).name
    return value
