"""Data in every container, as plain values with their numbers: lines of a file, paragraphs of a text, rows of a set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.errors import DataError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".parquet")
COMMIT = r"[0-9a-f]{40}"
Pin = Callable[[str], tuple[str, str | None]]  # org/name[@revision] -> id and commit


@dataclass(frozen=True)
class Values:
    """What a container holds, by number, and what could not be read of it."""

    values: list[tuple[int, object]]
    problems: list[tuple[int, str]] = field(default_factory=list)


def read_bytes(path: Path) -> bytes:
    """A file whole."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "data paths are relative to the recipe's file") from None


def parse_lines(path: Path, raw: bytes) -> Values:
    """JSON Lines. Only \\n ends a line: U+2028 may stand inside JSON."""
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise DataError(f"{path}: a JSON array, expected JSON Lines", "write one object a line: jq -c '.[]' FILE")
    parsed = Values([])
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            parsed.values.append((number, json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            parsed.problems.append((number, f"not UTF-8 (byte {error.start} of the line)"))
        except (ValueError, RecursionError) as error:
            parsed.problems.append((number, f"not JSON ({error})"))
    return parsed


def parse_paragraphs(path: Path, raw: bytes) -> Values:
    """Plain text, a row for each paragraph."""
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})", "expected JSON Lines or plain text") from None
    paragraphs = (part.strip() for part in content.split("\n\n"))
    return Values(list(enumerate(({"text": text} for text in paragraphs if text), 1)))


def parse_parquet(path: Path) -> Values:
    """A table; a column that a row leaves empty is not there."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet ({str(error).splitlines()[0]})") from None
    return Values(list(enumerate(_without_empty(rows), 1)))


def read_hub_set(name: str, split: str, pin: Pin, subset: str | None) -> tuple[Values, str, str | None]:
    """A data set of the Hub, or a directory laid out like one; with its fingerprint and its commit."""
    import datasets

    repo, revision = (name, None) if Path(name).is_dir() else pin(name)
    try:
        table = datasets.load_dataset(repo, subset, split=split, revision=revision)
    except Exception as error:  # every backend of datasets has its own
        first = " ".join(str(error).split())[:300] or type(error).__name__
        parts = any(word in first.lower() for word in ("split", "config"))
        hint = "data.split and data.subset name its parts" if parts else "expected a file or a data set of the Hub"
        raise DataError(f"data set {name}: {first}", hint) from error
    commit = _commit(table) or revision
    if revision and re.fullmatch(COMMIT, revision) and commit != revision:  # offline, datasets takes the last
        raise DataError(
            f"data set {name}: the cache offers commit {commit}, expected {revision}", "load it once online"
        )
    return Values(list(enumerate(_without_empty(table)))), str(table._fingerprint), commit


def _without_empty(rows: Iterable[dict[str, object]]) -> Iterable[dict[str, object]]:
    return ({key: value for key, value in row.items() if value is not None} for row in rows)


def _commit(table: datasets.Dataset) -> str | None:
    """The commit that a data set of the Hub is of, also from the cache alone: datasets names its folder by it."""
    folders = [Path(file["filename"]).parent.name for file in table.cache_files]
    return next((name for name in folders if re.fullmatch(COMMIT, name)), None)
