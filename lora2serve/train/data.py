"""Rows of a data set, checked one by one, and their tokens with a label for each.

A row is ``{"messages": [{"role", "content"}, ...]}``, ``{"prompt", "completion"}`` or ``{"text"}``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2serve.errors import DataError
from lora2serve.recipe import DataRecipe

IGNORE = -100  # the label that no loss looks at (torch.nn.CrossEntropyLoss)
ROLES = ("system", "user", "assistant", "tool", "developer")
SHOWN = 10  # problems in words


@dataclass(frozen=True)
class Rows:
    """A checked data set and where it came from."""

    rows: list[dict[str, Any]]
    path: str
    sha256: str

    def record(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        return {"path": self.path, "sha256": self.sha256, "rows": len(self.rows)}


@dataclass(frozen=True)
class Tokens:
    """One row in token ids; ``labels`` has ``IGNORE`` where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    cut: bool  # whether it was longer than max_length


def load(recipe: DataRecipe) -> tuple[Rows, Rows | None]:
    """Training and held-out rows; DataError names every bad row."""
    train = read(recipe.train, recipe.split)
    if recipe.eval is not None:
        return train, read(recipe.eval, recipe.split)
    if not recipe.eval_split:
        return train, None
    order = list(range(len(train.rows)))
    random.Random(0).shuffle(order)
    held = set(order[: max(1, round(len(order) * recipe.eval_split))])
    parts = ([row for n, row in enumerate(train.rows) if (n in held) == keep] for keep in (False, True))
    kept, held_out = (Rows(rows, train.path, train.sha256) for rows in parts)
    if not kept.rows:
        raise DataError(f"{train.path}: {len(train.rows)} rows, none left to train on", "lower data.eval_split")
    return kept, held_out


def read(name: str, split: str) -> Rows:
    """A JSONL or Parquet file, or a data set of the Hub."""
    path = Path(name)
    if path.suffix in (".jsonl", ".json", ".parquet") or path.exists():
        return _read_file(path)
    return _read_hub(name, split)


def _read_file(path: Path) -> Rows:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "data paths are relative to the recipe's file") from None
    if path.suffix == ".parquet":
        import pyarrow.parquet

        numbered = list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        problems: list[str] = []
    else:
        numbered, problems = _parse_lines(path, raw)
    rows = []
    for number, row in numbered:
        reason = problem_of(row)
        if reason:
            problems.append(f"{path}:{number}: {reason}")
        else:
            rows.append(normal(row))
    _raise(problems, len(numbered))
    if not rows:
        raise DataError(f"{path}: no rows", "expected one JSON object a line")
    return Rows(rows, str(path), hashlib.sha256(raw).hexdigest())


def _parse_lines(path: Path, raw: bytes) -> tuple[list[tuple[int, Any]], list[str]]:
    numbered, problems = [], []
    for number, line in enumerate(raw.decode("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            numbered.append((number, json.loads(line)))
        except ValueError as error:
            problems.append(f"{path}:{number}: not JSON ({error})")
    return numbered, problems


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    repo, _, revision = name.partition("@")
    try:
        found = datasets.load_dataset(repo, split=split, revision=revision or None)
    except Exception as error:  # every backend of datasets has its own
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data set {name}: {first}", "expected a file or a data set of the Hub") from error
    problems = [f"{name}: row {n}: {reason}" for n, row in enumerate(found) if (reason := problem_of(row))]
    _raise(problems, len(found))
    return Rows([normal(row) for row in found], name, str(found._fingerprint))


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


def tokenize(row: Mapping[str, Any], tokenizer: Any, recipe: DataRecipe) -> Tokens:
    """Token ids and labels of one row, cut at ``max_length``."""
    ids, labels = _with_labels(row, tokenizer, recipe.completion_only)
    limit = recipe.max_length
    return Tokens(ids[:limit], labels[:limit], len(ids) > limit)


def _with_labels(row: Mapping[str, Any], tokenizer: Any, completion_only: bool) -> tuple[list[int], list[int]]:
    if "messages" in row:
        return _chat(row["messages"], tokenizer, completion_only)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "text" in row:
        ids = [*tokenizer(row["text"])["input_ids"], *eos]
        return ids, list(ids)
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], *eos]
    ignored = [IGNORE] * len(prompt) if completion_only else list(prompt)
    return prompt + completion, ignored + completion


def _chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, completion_only: bool) -> tuple[list[int], list[int]]:
    """The conversation as the template renders it; with ``completion_only`` the labels are the assistant's turns.

    A turn is found by rendering the conversation up to it and with it: what is new is the turn. That needs no
    {% generation %} marks in the template, and fails aloud where a template changes what it said before.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if not completion_only:
        return ids, list(ids)
    spans = list(_assistant_spans(messages, tokenizer, text))
    labels = [
        token if any(start < last and first < stop for start, stop in spans) and last > first else IGNORE
        for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _assistant_spans(messages: Sequence[Mapping[str, Any]], tokenizer: Any, text: str) -> Iterator[tuple[int, int]]:
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if text.startswith(before) and text.startswith(after):
            yield len(before), len(after)
        elif number == last:
            raise DataError(
                "the chat template renders a conversation differently once the assistant has answered",
                "train with data.completion_only: false, or use prompt + completion rows",
            )
