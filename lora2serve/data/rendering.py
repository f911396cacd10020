"""How a row is written for the model: the one place for chat templates, token ids and which of them are learned.

Training, parity and calibration all come here, so that what is compared is what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora2serve.data.rows import ChatRow, CompletionRow, Message, Row, TextRow
from lora2serve.data.tokenizer import Tokenizer, encode, encode_with_spans
from lora2serve.errors import DataError

IGNORE = -100  # the label that no loss looks at (torch.nn.CrossEntropyLoss)


@dataclass(frozen=True)
class RenderedRow:
    """One row as text and in token ids; ``labels`` has ``IGNORE`` where no loss is taken."""

    text: str
    ids: list[int]
    labels: list[int]


def render_row(row: Row, tokenizer: Tokenizer, *, completion_only: bool = False) -> RenderedRow:
    """The whole row; with ``completion_only`` a loss is taken on what the assistant says, or on the completion."""
    if isinstance(row, ChatRow):
        return _render_chat(row.messages, tokenizer, completion_only)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if isinstance(row, TextRow):
        ids = [*encode(tokenizer, row.text), *eos]
        return RenderedRow(row.text, ids, list(ids))
    prompt = encode(tokenizer, row.prompt)
    completion = [*encode(tokenizer, row.completion, special=False), *eos]
    ignored = [IGNORE] * len(prompt) if completion_only else list(prompt)
    return RenderedRow(row.prompt + row.completion, prompt + completion, ignored + completion)


def render_messages(messages: Sequence[Message], tokenizer: Tokenizer, *, generation_prompt: bool = False) -> str:
    """A conversation by the tokenizer's chat template. A template raises what it likes to refuse one."""
    if not tokenizer.chat_template:
        raise DataError(
            "rows of messages, but the tokenizer has no chat template", "use prompt + completion, or an instruct model"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)


def opening(row: Row) -> Sequence[Message] | str:
    """What a user would send: a conversation without its last answer, a prompt, or the first half of a text."""
    if isinstance(row, ChatRow):
        messages = list(row.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
    return row.prompt if isinstance(row, CompletionRow) else row.text[: max(1, len(row.text) // 2)]


def _render_chat(messages: Sequence[Message], tokenizer: Tokenizer, completion_only: bool) -> RenderedRow:
    """The conversation as the template renders it; with ``completion_only`` the labels are the assistant's turns.

    A turn is found by rendering the conversation up to it and with it: what is new is the turn. That needs no
    {% generation %} marks in the template, and is an error where a template changes what it wrote before.
    """
    text = render_messages(messages, tokenizer)
    ids, characters = encode_with_spans(tokenizer, text)
    if not completion_only:
        return RenderedRow(text, ids, list(ids))
    turns = list(_assistant_turns(messages, tokenizer, text))
    labels = [
        token if any(start < last and first < stop for start, stop in turns) and last > first else IGNORE
        for token, (first, last) in zip(ids, characters, strict=True)
    ]
    return RenderedRow(text, ids, labels)


def _assistant_turns(messages: Sequence[Message], tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int]]:
    """Where in ``text`` each turn of the assistant begins and ends."""
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_messages(messages[:number], tokenizer, generation_prompt=True)
        after = render_messages(messages[: number + 1], tokenizer)
        if text.startswith(before) and text.startswith(after):
            yield len(before), len(after)
        elif number == last:
            raise DataError(
                "the chat template renders a conversation differently once the assistant has answered",
                "train with data.completion_only: false, or use prompt + completion rows",
            )
