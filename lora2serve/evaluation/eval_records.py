"""What an evaluation leaves: ``evals/SUITE.json`` with its figures, ``evals/SUITE.jsonl`` with one line an item.

The second is enough to recompute the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord, read_text
from lora2serve.artifacts.suite_scores import SuiteScores
from lora2serve.errors import InputError
from lora2serve.system.small_files import write_text


@dataclass(frozen=True)
class ItemResult(JsonRecord):
    """One item: what was answered, and what it is worth. ``first_seconds``: until its first words.

    ``likelihoods`` are those of the item's choices in nats; ``error`` is why an engine gave no answer, which scores 0.
    """

    id: str
    prompt_sha256: str
    answer: str
    score: float
    seconds: float
    first_seconds: float | None = None
    tokens: int | None = None
    end: str = ""
    task: str = ""
    group: str = ""
    likelihoods: tuple[float, ...] = ()
    error: str = ""
    question: str = ""
    expected: tuple[str, ...] = ()
    first_tokens: Mapping[str, float] = field(default_factory=dict)  # the likeliest, with their log-probabilities


@dataclass(frozen=True, kw_only=True)
class SuiteEvaluation(SuiteScores):
    """``SuiteScores``, and what was measured how."""

    WHOLE: ClassVar[bool] = True

    subject: str = ""
    items: int = 0
    scorer: str = ""
    decoding: Mapping[str, float] = field(default_factory=dict)
    overlap: str = ""  # with the rows that it was trained on, in words
    failed: int = 0  # items that the engine gave no answer to
    versions: Mapping[str, str] = field(default_factory=dict)


def items_path(path: Path) -> Path:
    """The lines beside ``evals/SUITE.json``."""
    return path.with_suffix(".jsonl")


def write_items(items: Sequence[ItemResult], path: Path) -> None:
    """One line each, whole or not there."""
    text = "".join(json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in items)
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """A file of text, in one step; InputError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror}", "choose another folder with --out") from None


def read_items(path: Path) -> list[ItemResult]:
    """What ``write_items`` wrote; InputError names a bad line."""
    lines = read_text(path).splitlines()
    return [ItemResult.from_text(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
