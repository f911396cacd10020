"""What a row of a data set is: a conversation, a prompt with its completion, or a text; and why a value is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

ROLES = ("system", "user", "assistant", "tool", "developer")
FORMS = "a row is {messages: [{role, content}, ...]}, {prompt, completion} or {text}"


class Message(TypedDict):
    """One turn. What else it holds (a name, tool calls) goes to the chat template as it is."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatRow:
    """``{"messages": [{"role", "content"}, ...]}``, with at least one turn of the assistant."""

    messages: Sequence[Message]

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        return {"messages": self.messages}


@dataclass(frozen=True)
class CompletionRow:
    """``{"prompt", "completion"}``."""

    prompt: str
    completion: str

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class TextRow:
    """``{"text"}``."""

    text: str

    def json(self) -> dict[str, object]:
        """As it is written to a file."""
        return {"text": self.text}


Row = ChatRow | CompletionRow | TextRow


def parse_row(value: object) -> Row | str:
    """The row, or why ``value`` is none. Keys of another form are left out."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__}, expected an object"
    if "messages" in value:
        return _problem_of_messages(value["messages"]) or ChatRow(value["messages"])
    if "prompt" in value or "completion" in value:
        prompt, completion = value.get("prompt"), value.get("completion")
        if not isinstance(prompt, str):
            return f"prompt is {prompt!r}, expected text"
        if not isinstance(completion, str):
            return f"completion is {completion!r}, expected text"
        return CompletionRow(prompt, completion) if completion else "completion is empty"
    if "text" in value:
        text = value["text"]
        return TextRow(text) if text and isinstance(text, str) else f"text is {text!r}, expected text"
    return f"keys {', '.join(map(str, value)) or 'none'}, expected messages, prompt + completion, or text"


def _problem_of_messages(messages: object) -> str:
    if not isinstance(messages, list) or not messages:
        return "messages is empty or not a list"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            return f"messages[{number}].role is {role!r}, expected one of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"messages[{number}].content is {message.get('content')!r}, expected text"
    if not any(message["role"] == "assistant" for message in messages):
        return "messages has no assistant turn to learn from"
    return ""
