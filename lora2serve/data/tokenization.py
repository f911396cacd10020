"""Rows in token ids, with a label for each: which tokens a loss is taken on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora2serve.config.recipe import DataRecipe
from lora2serve.data.rows import DataSets
from lora2serve.errors import DataError
from lora2serve.progress import Progress

IGNORE = -100  # the label that no loss looks at (torch.nn.CrossEntropyLoss)


@dataclass(frozen=True)
class Tokens:
    """One row in token ids; ``labels`` has ``IGNORE`` where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    cut: bool  # whether it was longer than max_length

    @property
    def learned(self) -> bool:
        """Whether a loss is taken on any token: the first one has nothing before it to be told from."""
        return any(label != IGNORE for label in self.labels[1:])


def tokenize_all(rows: DataSets, tokenizer: Any, recipe: DataRecipe, progress: Progress) -> list[Tokens]:
    """Every row in tokens; DataError names the line of a row that the chat template refuses."""
    if any("messages" in row for row in rows.rows) and not tokenizer.chat_template:
        raise DataError(
            f"{rows.path}: rows of messages, but the tokenizer has no chat template",
            "use prompt + completion, or an instruct model",
        )
    found = []
    with progress.track("tokenize", len(rows.rows)) as advance:
        for index, row in enumerate(rows.rows):
            try:
                found.append(tokenize(row, tokenizer, recipe))
            except DataError as error:
                raise DataError(f"{rows.where(index)}: {error.message}", error.hint) from None
            except Exception as error:  # a template raises what it likes
                raise DataError(f"{rows.where(index)}: the chat template refuses it: {error}") from error
            advance(1)
    return found


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
