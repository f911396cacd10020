"""Rows of a data set, checked one by one.

A row is ``{"messages": [{"role", "content"}, ...]}``, ``{"prompt", "completion"}`` or ``{"text"}``.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2serve.config.recipe import DataRecipe
from lora2serve.errors import DataError

ROLES = ("system", "user", "assistant", "tool", "developer")
SHOWN = 10  # problems in words


Pin = Callable[[str], tuple[str, str | None]]  # org/name[@revision] -> id and commit


def _as_named(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    return repo, revision or None


@dataclass(frozen=True)
class DataSets:
    """A checked data set and where it came from: ``numbers`` are lines of a file, or row numbers."""

    rows: list[dict[str, Any]]
    path: str
    sha256: str
    numbers: list[int]
    revision: str | None = None  # the commit of a data set on the Hub

    def where(self, index: int) -> str:
        """``train.jsonl:7``."""
        return f"{self.path}:{self.numbers[index]}"

    def pick(self, indexes: Sequence[int]) -> DataSets:
        """A part of it."""
        chosen = [self.rows[n] for n in indexes], [self.numbers[n] for n in indexes]
        return DataSets(chosen[0], self.path, self.sha256, chosen[1], self.revision)

    def record(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        pinned = {"revision": self.revision} if self.revision else {}
        return {"path": self.path, "sha256": self.sha256, "rows": len(self.rows), **pinned}


def load(recipe: DataRecipe, pin: Pin = _as_named) -> tuple[DataSets, DataSets | None]:
    """Training and held-out rows; DataError names every bad row. ``pin`` finds the commit of a data set on the Hub."""
    train = read(recipe.train, recipe.split, pin, recipe.subset)
    if recipe.eval is not None:
        return train, read(recipe.eval, recipe.split, pin, recipe.subset)
    if isinstance(recipe.eval_split, str):
        if not _has_splits(recipe.train):
            raise DataError(
                f"data.eval_split: {recipe.eval_split}, but {recipe.train} is a file, which has no splits",
                "set a share such as 0.05, or name a file of its own in data.eval",
            )
        return train, read(recipe.train, recipe.eval_split, pin, recipe.subset)
    return _held_out(train, recipe.eval_split or 0.0)


def _held_out(train: DataSets, share: float) -> tuple[DataSets, DataSets | None]:
    """A share of the rows kept apart, the same ones each time."""
    if not share:
        return train, None
    order = list(range(len(train.rows)))
    random.Random(0).shuffle(order)
    held = max(1, round(len(order) * share))
    if held >= len(order):
        raise DataError(f"{train.path}: {len(order)} rows, none left to train on", "lower data.eval_split")
    return train.pick(sorted(order[held:])), train.pick(sorted(order[:held]))


def read(name: str, split: str = "train", pin: Pin = _as_named, subset: str | None = None) -> DataSets:
    """A JSONL or Parquet file; or a data set with splits: a directory, or one of the Hub."""
    return _read_set(name, split, pin, subset) if _has_splits(name) else _read_file(Path(name))


def _has_splits(name: str) -> bool:
    """Whether this is a data set's directory or Hub id, not a file."""
    path = Path(name)
    return path.is_dir() or not (path.suffix in (".jsonl", ".json", ".parquet") or path.exists())


def _read_file(path: Path) -> DataSets:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "data paths are relative to the recipe's file") from None
    numbered, problems = _parse_parquet(path) if path.suffix == ".parquet" else _parse_lines(path, raw)
    rows, numbers = [], []
    for number, row in numbered:
        reason = problem_of(row)
        if reason:
            problems.append((number, reason))
        else:
            rows.append(normal(row))
            numbers.append(number)
    _raise([f"{path}:{number}: {reason}" for number, reason in sorted(problems)], len(rows) + len(problems))
    if not rows:
        raise DataError(f"{path}: no rows", "expected one JSON object a line")
    return DataSets(rows, str(path), hashlib.sha256(raw).hexdigest(), numbers)


def _parse_lines(path: Path, raw: bytes) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    """JSON by line number, and the lines that are none. Only \\n ends a line: U+2028 may stand inside JSON."""
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise DataError(f"{path}: a JSON array, expected JSON Lines", "write one object a line: jq -c '.[]' FILE")
    numbered, problems = [], []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            numbered.append((number, json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            problems.append((number, f"not UTF-8 (byte {error.start} of the line)"))
        except (ValueError, RecursionError) as error:
            problems.append((number, f"not JSON ({error})"))
    return numbered, problems


def _parse_parquet(path: Path) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet ({str(error).splitlines()[0]})") from None
    filled = ({key: value for key, value in row.items() if value is not None} for row in found)  # a column is in each
    return list(enumerate(filled, 1)), []


def _read_set(name: str, split: str, pin: Pin, subset: str | None) -> DataSets:
    import datasets

    repo, revision = (name, None) if Path(name).is_dir() else pin(name)
    try:
        found = datasets.load_dataset(repo, subset, split=split, revision=revision)
    except Exception as error:  # every backend of datasets has its own
        first = " ".join(str(error).split())[:300] or type(error).__name__
        parts = any(word in first.lower() for word in ("split", "config"))
        hint = "data.split and data.subset name its parts" if parts else "expected a file or a data set of the Hub"
        raise DataError(f"data set {name}: {first}", hint) from error
    commit = _commit(found) or revision
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and commit != revision:  # offline, datasets takes the last
        raise DataError(
            f"data set {name}: the cache offers commit {commit}, expected {revision}", "load it once online"
        )
    filled = [{key: value for key, value in row.items() if value is not None} for row in found]
    problems = [f"{name}:{n}: {reason}" for n, row in enumerate(filled) if (reason := problem_of(row))]
    _raise(problems, len(found))
    return DataSets([normal(row) for row in filled], name, str(found._fingerprint), list(range(len(found))), commit)


def _commit(found: Any) -> str | None:
    """The commit that a data set of the Hub is of, also from the cache alone: datasets names its folder by it."""
    folders = [Path(file["filename"]).parent.name for file in found.cache_files]
    return next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)


def _raise(problems: Sequence[str], total: int) -> None:
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        hint = "a row is {messages: [{role, content}, ...]}, {prompt, completion} or {text}"
        raise DataError("\n".join([f"{len(problems)} of {total} rows cannot be used:", *problems[:SHOWN], *more]), hint)


def problem_of(row: Any) -> str:
    """Why a row cannot be used, or an empty string."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, expected an object"
    if "messages" in row:
        return _problem_of_messages(row["messages"])
    if "prompt" in row or "completion" in row:
        bad = [key for key in ("prompt", "completion") if not isinstance(row.get(key), str)]
        return (
            f"{bad[0]} is {row.get(bad[0])!r}, expected text"
            if bad
            else "completion is empty" * (not row["completion"])
        )
    if "text" in row:
        return "" if isinstance(row["text"], str) and row["text"] else f"text is {row['text']!r}, expected text"
    return f"keys {', '.join(map(str, row)) or 'none'}, expected messages, prompt + completion, or text"


def _problem_of_messages(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        return "messages is empty or no list"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            return f"messages[{number}].role is {role!r}, expected one of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"messages[{number}].content is {message.get('content')!r}, expected text"
    if not any(message["role"] == "assistant" for message in messages):
        return "messages has no assistant turn to learn from"
    return ""


def normal(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the keys of its form only."""
    for keys in (("messages",), ("prompt", "completion"), ("text",)):
        if keys[0] in row:
            return {key: row[key] for key in keys}
    raise AssertionError("checked before")
