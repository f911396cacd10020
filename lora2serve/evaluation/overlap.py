"""Whether a suite asks what was trained on: the same rows by their hash, and near ones by their n-grams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import DataSource
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.config.recipe import load_section
from lora2serve.data.data_sets import read_file
from lora2serve.data.row_forms import as_conversation
from lora2serve.data.rows import CompletionRow, Row, TextRow, answered
from lora2serve.errors import DataError
from lora2serve.evaluation.scorers import normalize
from lora2serve.evaluation.suite import Suite
from lora2serve.system.small_files import digest

WORDS = 8  # of one n-gram
SHARE = 0.5  # of a question's n-grams that stand in the rows, from which on it is near
SHOWN = 3


@dataclass(frozen=True)
class Overlap:
    """``same``: questions that were trained on, ``near``: those whose words were; ``unchecked``: why nobody knows."""

    items: int
    same: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    unchecked: str = ""

    @property
    def text(self) -> str:
        """In words; empty where nothing was found."""
        if self.unchecked:
            return f"not checked: {self.unchecked}"
        parts = []
        if self.same:
            parts.append(f"{len(self.same)} of {self.items} questions were trained on ({_few(self.same)})")
        if self.near:
            parts.append(f"{len(self.near)} have most of their words in rows that were ({_few(self.near)})")
        return "; ".join(parts)


def with_training_rows(asked: Mapping[str, Sequence[str]], run: Run | None) -> Overlap:
    """Compare what is ``asked`` (an item's name -> its texts) with the rows that a run was trained on, where these are
    still as they were.
    """
    count = len(asked)
    if run is None:
        return Overlap(count, unchecked="nobody knows what it was trained on")
    train = run.record.data.train
    sources = (train.parts or (train,)) if train else ()
    if not sources:
        return Overlap(count, unchecked="its record names no rows")
    if reason := next((reason for source in sources if (reason := _gone(source))), ""):
        return Overlap(count, unchecked=reason)
    columns = load_section(run.recipe, DataRecipe).columns
    try:
        rows = [row for source in sources for row in read_file(Path(source.path), columns, plain_text=True).rows]
    except DataError as error:
        return Overlap(count, unchecked=error.message.splitlines()[0])
    held_out = _keys(read_file(run.eval_data, {}, plain_text=True).rows) if run.eval_data.is_file() else set()
    return compare(asked, rows, held_out)


def questions(suite: Suite) -> dict[str, tuple[str, ...]]:
    """What a suite asks, by the name of each item."""
    return {item.name: (item.question,) for item in suite.items}


def compare(asked: Mapping[str, Sequence[str]], rows: Sequence[Row], held_out: Iterable[str] = ()) -> Overlap:
    """``held_out``: what was kept apart of the same file, and not trained on."""
    trained, grams = _keys(rows) - set(held_out), set[str]()
    for row in rows:
        if _key(_question(row)) in trained:
            grams |= _grams(_words(row))
    same = [name for name, texts in asked.items() if any(_key(text) in trained for text in texts)]
    left = {name: texts for name, texts in asked.items() if name not in set(same)}
    near = [name for name, texts in left.items() if any(_near(text, grams) for text in texts)]
    return Overlap(len(asked), tuple(same), tuple(near))


def _gone(source: DataSource) -> str:
    path = Path(source.path)
    if not path.is_file():
        return f"{source.path} is not here"
    return "" if source.sha256 in (None, digest(path)["sha256"]) else f"{source.path} changed since the training"


def _keys(rows: Iterable[Row]) -> set[str]:
    return {_key(question) for row in rows if (question := _question(row))}


def _question(row: Row) -> str:
    """The last turn before the last answer; of a text, all of it."""
    row = answered(row)
    if isinstance(row, TextRow):
        return row.text
    chat = as_conversation(row) if isinstance(row, CompletionRow) else row
    before = [message["content"] or "" for message in chat.messages if message["role"] == "user"]
    return before[-1] if before else ""


def _words(row: Row) -> str:
    row = answered(row)
    if isinstance(row, TextRow):
        return row.text
    chat = as_conversation(row) if isinstance(row, CompletionRow) else row
    return "\n".join(message["content"] or "" for message in chat.messages)


def _near(question: str, grams: set[str]) -> bool:
    own = _grams(question)
    return bool(own) and len(own & grams) >= SHARE * len(own)


def _grams(text: str) -> set[str]:
    words = normalize(text).split()
    return {" ".join(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


def _key(text: str) -> str:
    return hashlib.sha256(normalize(text).encode()).hexdigest()


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
