"""Checked data sets, each row with where it came from, and what is held out of them."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora2serve.config.data_recipe import DataRecipe, SourceRecipe
from lora2serve.config.objectives import Objective
from lora2serve.config.schema import show
from lora2serve.data.message_forms import RowProblem
from lora2serve.data.readers import SUFFIXES, TABLES, Pin, file_digest, read_hub_set, read_values
from lora2serve.data.row_forms import RowReader, as_conversation, forms
from lora2serve.data.rows import CompletionRow, LabeledRow, PreferenceRow, Row, answered
from lora2serve.data.text_readers import Numbered, Unreadable
from lora2serve.errors import DataError

LISTED_PROBLEMS = 10  # the others are counted


def _unpinned(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    return repo, revision or None


@dataclass(frozen=True)
class DataSet:
    """Checked rows and where they came from: ``numbers`` are lines of a file, or row numbers.

    ``parts`` are the sets that it was mixed of. ``unread`` counts the rows that hold a key which nobody reads.
    """

    rows: list[Row]
    path: str
    sha256: str
    numbers: list[int]
    revision: str | None = None  # the commit of a data set on the Hub
    unread: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[DataSet, ...] = ()

    def where(self, index: int) -> str:
        """``train.jsonl:7``."""
        return f"{self.rows[index].source or self.path}:{self.numbers[index]}"

    def in_form(self, form: str, chat_template: str | None) -> DataSet:
        """With prompts and completions as conversations, where ``data.form`` and the model's template have it so."""
        if form != "chat" or not chat_template:
            return self
        return replace(self, rows=[_in_chat(row) for row in self.rows])

    def note_of_form(self, form: str, chat_template: str | None) -> str:
        """What ``in_form`` makes of prompts and completions, in words; empty where it leaves all as it is."""
        count = sum(isinstance(answered(row), CompletionRow) for row in self.rows)
        if not count or form != "chat" or not chat_template:
            return ""
        return (
            f"{count} rows of prompt and completion are written by the chat template, as questions and answers "
            "(data.form: raw takes them as they stand)"
        )

    def warnings(self) -> list[str]:
        """What the rows hold and nobody reads."""
        keys = [f"{show(key)[1:-1]} ({count} rows)" for key, count in sorted(self.unread.items())]
        return [f"{self.path}: not read: {', '.join(keys)}"] if keys else []

    def pick(self, indexes: Sequence[int]) -> DataSet:
        """A part of it."""
        return replace(self, rows=[self.rows[n] for n in indexes], numbers=[self.numbers[n] for n in indexes])


@dataclass(frozen=True)
class DataSets:
    """What a run is trained on, and what is held out."""

    train: DataSet
    held_out: DataSet | None = None

    def in_form(self, form: str, chat_template: str | None) -> DataSets:
        """Both of them."""
        held_out = self.held_out.in_form(form, chat_template) if self.held_out else None
        return DataSets(self.train.in_form(form, chat_template), held_out)

    def warnings(self) -> list[str]:
        """What the rows hold and nobody reads."""
        return [text for data in (self.train, self.held_out) if data for text in data.warnings()]


def _in_chat(row: Row) -> Row:
    if isinstance(row, PreferenceRow):
        chosen, rejected = (as_conversation(side) if isinstance(side, CompletionRow) else side for side in row.sides)
        return replace(row, chosen=chosen, rejected=rejected)
    if isinstance(row, LabeledRow):
        return replace(row, answer=as_conversation(row.answer)) if isinstance(row.answer, CompletionRow) else row
    return as_conversation(row) if isinstance(row, CompletionRow) else row


def load(recipe: DataRecipe, pin: Pin = _unpinned, objective: Objective | None = None) -> DataSets:
    """Training and held-out rows; DataError names every bad row. ``pin`` finds the commit of a data set on the Hub.

    ``objective``: what they are trained for; None where they are looked at only.
    """
    sources, gate = recipe.sources("train"), _Gate(recipe.columns, pin, objective)
    weights = [source.weight for source in sources]
    train = [gate.read(source) for source in sources]
    if isinstance(recipe.eval_split, str):
        held_out = [gate.read(replace(_with_splits(source, recipe), split=recipe.eval_split)) for source in sources]
    else:
        held_out = [gate.read(source) for source in recipe.sources("eval")]
    gate.close()
    share = recipe.eval_split
    if isinstance(share, float) and share:
        pairs = [_hold_out(data, share) for data in train]
        train, held_out = [kept for kept, _ in pairs], [apart for _, apart in pairs]
    return DataSets(mix(train, weights), mix(held_out, [1.0] * len(held_out)) if held_out else None)


def refuse_bad_files(recipe: DataRecipe, objective: Objective | None = None) -> None:
    """DataError as ``load`` raises it where all data are files; what may have to be fetched is not looked at."""
    sources = [*recipe.sources("train"), *recipe.sources("eval")]
    if not any(_has_splits(source.path) for source in sources):
        load(recipe, objective=objective)


def read(name: str, split: str = "train", pin: Pin = _unpinned, subset: str | None = None) -> DataSet:
    """A file by its name; or a data set with splits: a directory, or one of the Hub."""
    gate = _Gate({}, pin)
    data = gate.read(SourceRecipe(name, split=split, subset=subset))
    gate.close()
    return data


def read_file(path: Path, columns: Mapping[str, str], *, plain_text: bool = False) -> DataSet:
    """A file of rows; with ``plain_text`` one whose name says nothing is read by paragraphs, unless it is JSON."""
    gate = _Gate(columns, _unpinned)
    data = gate.read_file(path, plain_text=plain_text)
    gate.missing = None  # this file may have our names
    gate.close()
    return data


def mix(parts: Sequence[DataSet], weights: Sequence[float]) -> DataSet:
    """One set of several, in which each row stands as often as its set's weight says; the trainer shuffles them."""
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]
    weighted = [_weighted(data, weight) for data, weight in zip(parts, weights, strict=True)]
    unread: Counter[str] = Counter()
    for data in parts:
        unread.update(data.unread)
    digest = hashlib.sha256(repr([(data.sha256, weight) for data, weight in zip(parts, weights, strict=True)]).encode())
    mixed = DataSet(
        rows=[row for data in weighted for row in data.rows], path=" + ".join(data.path for data in parts),
        sha256=digest.hexdigest(), numbers=[number for data in weighted for number in data.numbers],
        revision=parts[0].revision if len(parts) == 1 else None, unread=unread, parts=tuple(weighted),
    )  # fmt: skip
    if not mixed.rows:
        raise DataError(f"{mixed.path}: no rows left", "raise the weights in data.train")
    return mixed


def _weighted(data: DataSet, weight: float) -> DataSet:
    """Each row so many times; of a fraction the same rows each time, drawn at random."""
    count = len(data.rows)
    some = random.Random(0).sample(range(count), round(count * (weight % 1)))
    return data.pick([*range(count)] * int(weight) + sorted(some))


@dataclass
class _Gate:
    """Reads data sets, and refuses everything that is wrong with any of them at once."""

    columns: Mapping[str, str]
    pin: Pin
    objective: Objective | None = None
    problems: list[str] = field(default_factory=list)
    count: int = 0
    missing: set[str] | None = None  # columns that no set has

    def read(self, source: SourceRecipe) -> DataSet:
        """One data set, without its bad rows."""
        if not _has_splits(source.path):
            return self.read_file(Path(source.path))
        values, fingerprint, commit = read_hub_set(source.path, source.split or "train", self.pin, source.subset)
        return self._rows(values, DataSet([], source.path, fingerprint, [], commit), filled=True)

    def read_file(self, path: Path, *, plain_text: bool = False) -> DataSet:
        """A file, without its bad rows; DataError where it has none at all."""
        empty, before = DataSet([], str(path), file_digest(path), []), self.count
        data = self._rows(read_values(path, plain_text=plain_text), empty, filled=path.suffix in TABLES)
        if self.count == before:
            raise DataError(f"{path}: no rows", "expected one JSON object a line, or a table")
        return data

    def _rows(self, values: Numbered, empty: DataSet, *, filled: bool) -> DataSet:
        """``empty`` with the rows that ``values`` are; ``filled`` up with nulls, as tables are."""
        rows, numbers, reader = [], [], RowReader(self.columns, filled, self.objective)
        for number, value in values:
            self.count += 1
            try:
                if isinstance(value, Unreadable):
                    raise RowProblem(value.reason)
                rows.append(replace(reader.read(value), source=empty.path))
                numbers.append(number)
            except RowProblem as problem:
                self.problems.append(f"{empty.path}:{number}: {problem}")
        missing = self.columns.keys() - reader.present - {"role", "content"}
        self.missing = missing if self.missing is None else self.missing & missing
        return replace(empty, rows=rows, numbers=numbers, unread=reader.unread)

    def close(self) -> None:
        """DataError for all that was wrong."""
        lines, shown = self.problems, self.problems[:LISTED_PROBLEMS]
        if not lines and self.missing and self.count:
            columns = [f"data.columns.{key}: no row has {self.columns[key]!r}" for key in sorted(self.missing)]
            raise DataError("\n".join(columns), "name columns of the data")
        if lines:
            more = [f"... and {len(lines) - LISTED_PROBLEMS} more"] if len(lines) > LISTED_PROBLEMS else []
            found = [f"{len(lines)} of {self.count} rows cannot be used:", *shown, *more]
            raise DataError("\n".join(found), forms(self.objective))


def _with_splits(source: SourceRecipe, recipe: DataRecipe) -> SourceRecipe:
    if not _has_splits(source.path):
        raise DataError(
            f"data.eval_split: {recipe.eval_split}, but {source.path} is a file, which has no splits",
            "set a share such as 0.05, or name a separate file in data.eval",
        )
    return source


def _has_splits(name: str) -> bool:
    """Whether this is a data set's directory or Hub id, not a file."""
    path = Path(name)
    return path.is_dir() or not (path.suffix in SUFFIXES or path.exists())


def _hold_out(data: DataSet, share: float) -> tuple[DataSet, DataSet]:
    """What stays, and a share of the rows kept apart, the same ones each time."""
    order = list(range(len(data.rows)))
    random.Random(0).shuffle(order)
    count = max(1, round(len(order) * share))
    if count >= len(order):
        hint = "more rows, or data.eval_split 0" if len(order) == 1 else "lower data.eval_split"
        raise DataError(f"{data.path}: {len(order)} row{'s' * (len(order) > 1)}, none left to train on", hint)
    apart = data.pick(sorted(order[:count]))
    return data.pick(sorted(order[count:])), replace(apart, unread={})  # which are counted once, with the others
