"""What a row of a data set is: a conversation, a prompt with its completion, a text, or two answers to a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NotRequired, TypedDict, cast

ROLES = ("system", "user", "assistant", "tool", "developer")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # what templates call the thoughts of a turn


class Message(TypedDict):
    """One turn. What else it holds goes to the chat template as it is.

    ``content`` is None beside ``tool_calls`` only. A turn of the assistant with ``weight`` 0 is not learned; the
    weight never reaches the template.
    """

    role: str
    content: str | None
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, object]]]  # OpenAI's form, arguments as an object
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]
    weight: NotRequired[Literal[0]]


@dataclass(frozen=True)
class ChatRow:
    """``{"messages": [{"role", "content"}, ...]}``, with at least one turn of the assistant to learn.

    ``tools`` are what the model may call, in OpenAI's form; ``chat_template_kwargs`` are further arguments of the
    template, such as ``enable_thinking``. ``source`` is the file or data set that the row is of.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, object]] | None = None
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    task: str = ""
    source: str = field(default="", compare=False)

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        optional = {
            "tools": _written_tools(self.tools),
            "chat_template_kwargs": self.chat_template_kwargs,
            "task": self.task,
        }
        messages = [_written(message) for message in self.messages]
        return {"messages": messages, **{key: value for key, value in optional.items() if value}}


@dataclass(frozen=True)
class CompletionRow:
    """``{"prompt", "completion"}``."""

    prompt: str
    completion: str
    task: str = ""
    source: str = field(default="", compare=False)

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        pair = {"prompt": self.prompt, "completion": self.completion}
        return {**pair, "task": self.task} if self.task else dict(pair)


@dataclass(frozen=True)
class TextRow:
    """``{"text"}``."""

    text: str
    task: str = ""
    source: str = field(default="", compare=False)

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        return {"text": self.text, "task": self.task} if self.task else {"text": self.text}


@dataclass(frozen=True)
class PreferenceRow:
    """``{"prompt", "chosen", "rejected"}``: two rows of one form, the same but for their last turn or completion."""

    chosen: ChatRow | CompletionRow
    rejected: ChatRow | CompletionRow
    task: str = ""
    source: str = field(default="", compare=False)

    @property
    def sides(self) -> tuple[ChatRow | CompletionRow, ChatRow | CompletionRow]:
        """Both, the chosen one first."""
        return self.chosen, self.rejected

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        written: dict[str, object]
        if isinstance(self.chosen, CompletionRow):
            written = {"prompt": self.chosen.prompt}
        else:
            *before, _ = self.chosen.messages
            beside = {key: value for key, value in self.chosen.json().items() if key != "messages"}
            written = {"prompt": [_written(message) for message in before], **beside}
        answers = {name: _answer(side) for name, side in zip(SIDES, self.sides, strict=True)}
        return {**written, **answers, **({"task": self.task} if self.task else {})}


@dataclass(frozen=True)
class LabeledRow:
    """``{"prompt", "completion", "label"}``, or a conversation: whether its last answer is one to give."""

    answer: ChatRow | CompletionRow
    label: bool
    task: str = ""
    source: str = field(default="", compare=False)

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        return {**self.answer.json(), "label": self.label, **({"task": self.task} if self.task else {})}


SIDES = ("chosen", "rejected")


def _answer(row: ChatRow | CompletionRow) -> object:
    return row.completion if isinstance(row, CompletionRow) else [_written(row.messages[-1])]


def _written_tools(tools: Sequence[Mapping[str, object]] | None) -> object:
    """As text where a null is in them, which is kept there."""
    text = json.dumps(tools)
    return text if "null" in text and tools else tools


def _written(message: Message) -> Mapping[str, object]:
    """With the arguments of tool calls as text, in which a null is kept."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = cast("Mapping[str, object]", call["function"])
        calls.append({**call, "function": {**function, "arguments": json.dumps(function["arguments"])}})
    return {**message, "tool_calls": calls}


Row = ChatRow | CompletionRow | TextRow | PreferenceRow | LabeledRow


def answered(row: Row) -> ChatRow | CompletionRow | TextRow:
    """The row with an answer, of two the chosen one; ``LabeledRow.label`` says whether its only one is right."""
    if isinstance(row, PreferenceRow | LabeledRow):
        answer = row.chosen if isinstance(row, PreferenceRow) else row.answer
        return replace(answer, task=row.task, source=row.source)
    return row
