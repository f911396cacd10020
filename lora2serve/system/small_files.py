"""Small files read with care: JSON within bounds, names that stay inside a folder, digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeAlias

from lora2serve.errors import CheckpointError, InputError

JsonObject: TypeAlias = Mapping[str, Any]  # a config of another program: what its values are, is known there

LONGEST_NAME = 255  # bytes of a file's name on Linux
MAX_SIZE = 100_000_000  # bytes: the limit of a safetensors header, and ours for an index or a config


def read_json(path: Path, if_missing: str, error: type[InputError] = CheckpointError) -> dict[str, Any]:
    """A JSON object from a small file; one line where it is missing, too large or no object."""
    try:
        refuse_large(path, error)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path.parent}: {if_missing}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not JSON ({str(problem)[:100]})") from None
    if not isinstance(content, dict):
        raise error(f"{path}: a {type(content).__name__}, expected a JSON object")
    return content


def without_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of json; ValueError for a key that is there twice, of which readers take either."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)[:60]!r} is there twice")
    return content


def refuse_large(path: Path, error: type[InputError]) -> None:
    """An error for what is no small file: it may be as large as a disk, or a pipe that never says anything."""
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise error(f"{path}: not a file", "the directory is damaged or malicious")
    if status.st_size > MAX_SIZE:
        raise error(f"{path}: {status.st_size} bytes, expected {MAX_SIZE} at most", "the file is damaged or malicious")


def inside(root: Path, name: str) -> Path:
    """``root/name`` for a plain file name that stays inside ``root`` (or inside the Hub cache's blobs)."""
    if not name or "\0" in name or "\\" in name or ":" in name or Path(name).name != name or name in (".", ".."):
        raise CheckpointError(
            f"{root}: file name {name!r} in the index, expected a plain name", "the index is damaged or malicious"
        )
    path = root / name
    try:
        real = path.resolve(strict=True)
    except OSError:
        raise CheckpointError(f"{path}: missing, but named by the index", "fetch the model again") from None
    if leads_away(root, path) or not real.is_file():
        raise CheckpointError(
            f"{path}: points to {real}, outside the model directory", "copy the file into the directory"
        )
    return path


def leads_away(root: Path, path: Path) -> bool:
    """Whether a file in ``root`` is a link to one that is neither there nor among the blobs of the same Hub cache.

    Who fetches a repository with git gets the links that its author put there, to any file of the reader's.
    """
    home, real = root.resolve(), path.resolve()
    snapshots = next((folder for folder in home.parents if folder.name == "snapshots"), None)
    blobs = snapshots.parent / "blobs" if snapshots else home
    return not (real.is_relative_to(home) or real.parent == blobs)


def plain_path(path: Path) -> Path:
    """The path without ``..``, which is the parent of what a link before it points to."""
    parts = path.absolute().parts
    if ".." not in parts:
        return path
    end = len(parts) - parts[::-1].index("..")
    return Path(*parts[:end]).resolve().joinpath(*parts[end:])


def is_relative(name: str) -> bool:
    """Whether ``name`` is that of a file in a folder or in one below it, written the one plain way."""
    return "\0" not in name and not any(
        part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > LONGEST_NAME for part in name.split("/")
    )


def file_mode() -> int:
    """The mode of a file that is made as others are, by the umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def let_umask_decide(folder: Path) -> None:
    """Give its files the mode of others: safetensors makes them for their owner alone, and servers run as others."""
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(file_mode())


def sync_to_disk(path: Path) -> None:
    """What is written of a file, or the names in a folder, survives a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a file in one step: it is whole or as it was, for readers and if this process dies. OSError as usual.

    ``durable``: after a power cut, too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        if durable:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:  # a full disk, Ctrl-C
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_to_disk(path.parent)


def digest(path: Path) -> dict[str, Any]:
    """``{"sha256": hex, "size": bytes}`` of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": os.fstat(file.fileno()).st_size}
