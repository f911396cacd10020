"""Checked data sets, each row with where it came from, and what is held out of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora2serve.config.recipe import DataRecipe
from lora2serve.data.readers import (
    SUFFIXES,
    Pin,
    Values,
    parse_lines,
    parse_paragraphs,
    parse_parquet,
    read_bytes,
    read_hub_set,
)
from lora2serve.data.row_forms import FORMS, parse_row
from lora2serve.data.rows import Row
from lora2serve.errors import DataError

LISTED_PROBLEMS = 10  # the others are counted


def _unpinned(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    return repo, revision or None


@dataclass(frozen=True)
class DataSet:
    """A checked data set and where it came from: ``numbers`` are lines of a file, or row numbers."""

    rows: list[Row]
    path: str
    sha256: str
    numbers: list[int]
    revision: str | None = None  # the commit of a data set on the Hub

    def where(self, index: int) -> str:
        """``train.jsonl:7``."""
        return f"{self.path}:{self.numbers[index]}"

    def pick(self, indexes: Sequence[int]) -> DataSet:
        """A part of it."""
        return replace(self, rows=[self.rows[n] for n in indexes], numbers=[self.numbers[n] for n in indexes])


@dataclass(frozen=True)
class DataSets:
    """What a run is trained on, and what is held out."""

    train: DataSet
    held_out: DataSet | None = None


def load(recipe: DataRecipe, pin: Pin = _unpinned) -> DataSets:
    """Training and held-out rows; DataError names every bad row. ``pin`` finds the commit of a data set on the Hub."""
    train = read(recipe.train, recipe.split, pin, recipe.subset)
    if recipe.eval is not None:
        return DataSets(train, read(recipe.eval, recipe.split, pin, recipe.subset))
    if isinstance(recipe.eval_split, str):
        if not _has_splits(recipe.train):
            raise DataError(
                f"data.eval_split: {recipe.eval_split}, but {recipe.train} is a file, which has no splits",
                "set a share such as 0.05, or name a separate file in data.eval",
            )
        return DataSets(train, read(recipe.train, recipe.eval_split, pin, recipe.subset))
    return _hold_out(train, recipe.eval_split or 0.0)


def read(name: str, split: str = "train", pin: Pin = _unpinned, subset: str | None = None) -> DataSet:
    """A JSONL or Parquet file; or a data set with splits: a directory, or one of the Hub."""
    if not _has_splits(name):
        return read_file(Path(name))
    values, fingerprint, commit = read_hub_set(name, split, pin, subset)
    return _checked(values, DataSet([], name, fingerprint, [], commit))


def read_file(path: Path, *, plain_text: bool = False) -> DataSet:
    """A file of rows; with ``plain_text`` one that is neither JSON Lines nor Parquet is read by paragraphs."""
    raw = read_bytes(path)
    if path.suffix == ".parquet":
        values = parse_parquet(path)
    elif plain_text and path.suffix not in SUFFIXES and not raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        values = parse_paragraphs(path, raw)
    else:
        values = parse_lines(path, raw)
    data = _checked(values, DataSet([], str(path), hashlib.sha256(raw).hexdigest(), []))
    if not data.rows:
        raise DataError(f"{path}: no rows", "expected one JSON object a line")
    return data


def _checked(values: Values, empty: DataSet) -> DataSet:
    """``empty`` with the rows that ``values`` are; DataError for those that are none."""
    rows, numbers, problems = [], [], list(values.problems)
    for number, value in values.values:
        row = parse_row(value)
        if isinstance(row, str):
            problems.append((number, row))
        else:
            rows.append(replace(row, source=empty.path))
            numbers.append(number)
    if problems:
        lines = [f"{empty.path}:{number}: {reason}" for number, reason in sorted(problems)]
        more = [f"... and {len(lines) - LISTED_PROBLEMS} more"] if len(lines) > LISTED_PROBLEMS else []
        total = f"{len(lines)} of {len(rows) + len(lines)} rows cannot be used:"
        raise DataError("\n".join([total, *lines[:LISTED_PROBLEMS], *more]), FORMS)
    return replace(empty, rows=rows, numbers=numbers)


def _has_splits(name: str) -> bool:
    """Whether this is a data set's directory or Hub id, not a file."""
    path = Path(name)
    return path.is_dir() or not (path.suffix in SUFFIXES or path.exists())


def _hold_out(data: DataSet, share: float) -> DataSets:
    """A share of the rows kept apart, the same ones each time."""
    if not share:
        return DataSets(data)
    order = list(range(len(data.rows)))
    random.Random(0).shuffle(order)
    count = max(1, round(len(order) * share))
    if count >= len(order):
        raise DataError(f"{data.path}: {len(order)} rows, none left to train on", "lower data.eval_split")
    return DataSets(data.pick(sorted(order[count:])), data.pick(sorted(order[:count])))
