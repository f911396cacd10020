"""Samples of data sets that took a while, kept in the user's cache by what they were made of.

The name of a file is a digest of the rows, the tokenizer with its template, the settings, and the code that renders.
It begins with a digest of its content: one that is damaged is removed and made again. Those that were not used for
longest make room for others.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data.rows import Row
from lora2serve.data.samples import SampleBatch, pack, unpack
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenizer import encode
from lora2serve.system.hardware import cache_folder

MOST_BYTES = 4 << 30  # of all files
SUFFIX, UNFINISHED = ".samples", ".part"
DIGEST = hashlib.sha256().digest_size
DAY = 86400.0
RENDERING = ("transformers", "tokenizers", "jinja2")


def key_of(rows: Sequence[Row], template: ChatTemplate, recipe: DataRecipe) -> str | None:
    """The digest of everything that samples are made of; None for a tokenizer that cannot be sent or kept."""
    encode(template.tokenizer, "a")  # at its first call transformers sets what it cuts and pads
    prints_date = "strftime_now" in str(template.tokenizer.chat_template)
    day = (template.day or date.today()).isoformat() if prints_date else ""
    settings = replace(recipe, train="", eval=None, eval_split=None)
    try:
        digest = hashlib.sha256(pickle.dumps(template.tokenizer))
    except (pickle.PicklingError, TypeError, AttributeError):  # of its own code, which somebody brought along
        return None
    digest.update(repr((template.stop_ids, day, settings, _code())).encode())
    for row in rows:
        digest.update(json.dumps([type(row).__name__, row.json()]).encode())
    return digest.hexdigest()


def load(key: str, rows: int, tokens: int) -> SampleBatch | None:
    """The samples of so many rows under ``key``, of a tokenizer of so many tokens; None where there are none."""
    path = _folder() / f"{key}{SUFFIX}"
    try:
        batch = _read(path.read_bytes(), rows, tokens)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, zlib.error, RecursionError, OverflowError):
        with suppress(OSError):
            path.unlink()
        return None
    with suppress(OSError):
        os.utime(path)
    return batch


def store(key: str, batch: SampleBatch) -> str:
    """Keep ``batch`` under ``key``: whole or not at all. The reason where it cannot be, else nothing."""
    folder = _folder()
    packed = zlib.compress(pack(batch), 1)
    if len(packed) > MOST_BYTES:
        return f"{len(packed) >> 20:,} MiB of tokens: too many to be kept for the next run"
    part = folder / f"{key}.{os.getpid()}{UNFINISHED}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(packed).digest() + packed)
        os.replace(part, folder / f"{key}{SUFFIX}")
        _make_room(folder)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        return f"{folder}: {error.strerror}, so the tokens are not kept for the next run"
    return ""


def _read(content: bytes, rows: int, tokens: int) -> SampleBatch:
    digest, packed = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(packed).digest() != digest:
        raise ValueError("damaged")
    batch = unpack(zlib.decompress(packed))
    order = [sample.row for sample in batch.samples]
    known = all(min(sample.input_ids) >= 0 and max(sample.input_ids) < tokens for sample in batch.samples)
    if batch.problem or batch.rows != rows or order != sorted(order) or not set(order) <= set(range(rows)) or not known:
        raise ValueError("samples of something else")
    return batch


def _make_room(folder: Path) -> None:
    """Remove what killed processes left, and the files that were not used for longest."""
    used = 0
    for age, size, path in sorted((time.time() - s.st_mtime, s.st_size, path) for path, s in _files(folder)):
        used += size
        if used > MOST_BYTES or (path.suffix == UNFINISHED and age > DAY):
            path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process makes room, too
            if path.suffix in (SUFFIX, UNFINISHED):
                yield path, path.stat()


def _folder() -> Path:
    return cache_folder() / "samples"


@cache
def _code() -> str:
    """What renders: this package, and the versions of the libraries."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return " ".join([digest.hexdigest(), *(metadata.version(name) for name in RENDERING)])
