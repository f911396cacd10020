"""What a chat template leaves out of a conversation: looked for in what a server would send, and in what is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from lora2serve.data.chat_turns import LearnedTurn, split_thought
from lora2serve.data.rows import ChatRow, Message
from lora2serve.data.served_template import ChatTemplate, thought_of

WHAT_OF_ROLE = {
    "system": "a system turn", "developer": "a developer turn", "user": "what a user says",
    "assistant": "an earlier answer", "tool": "a tool's result",
}  # fmt: skip


def template_losses(row: ChatRow, turns: Sequence[LearnedTurn], template: ChatTemplate) -> Iterator[str]:
    """What of a row is missing in its learned turns, in words that go with ``leaves out``; some come twice."""
    if not turns:
        return
    if row.messages[0]["role"] == "system" and template.refuses_system:
        yield "a system turn, which it refuses and which is put before the user's first words,"
    for turn in turns:
        yield from _of_answer(row.messages[turn.number], turn.answer)
    last = turns[-1]
    for message in row.messages[: last.number]:
        yield from _of_history(message, last.prompt)
    for tool in row.tools or ():
        if str(cast("Mapping[str, object]", tool["function"])["name"]) not in last.prompt:
            yield "a tool that may be called"
    for name in row.chat_template_kwargs:
        if not template.reads(name):
            yield f"chat_template_kwargs.{name}"


def _of_answer(message: Message, text: str) -> Iterator[str]:
    """What is not learned of an answer, or of its calls and thoughts."""
    thought = thought_of(message)
    if thought and not _holds(text, thought):
        yield "thoughts of an answer that is learned"
    if not _holds(text, _spoken(message)):
        yield "an answer that is learned"
    if not _holds_calls(text, message):
        yield "a call of a tool that is learned"


def _of_history(message: Message, text: str) -> Iterator[str]:
    if message["role"] == "assistant" and not _holds(text, split_thought(message)[0]):
        yield "thoughts of an earlier answer"
    if not _holds(text, _spoken(message)):
        yield WHAT_OF_ROLE[message["role"]]
    if not _holds_calls(text, message):
        yield "an earlier call of a tool"


def _spoken(message: Message) -> str:
    """The content behind thoughts that stand in it."""
    plain = split_thought(message)[1] if message["role"] == "assistant" else message
    return plain.get("content") or ""


def _holds(text: str, part: str) -> bool:
    """Whether ``part`` is in ``text``, as it is or as JSON writes it; space at its edges and in its lines is free."""
    words = part.strip()
    if words in text or json.dumps(words)[1:-1] in text or json.dumps(words, ensure_ascii=False)[1:-1] in text:
        return True
    return all(line.strip() in text for line in words.splitlines()) or _same_json(text, words)


def _same_json(text: str, words: str) -> bool:
    """Whether a result of a tool that is JSON is there, in another spacing."""
    try:
        value = json.loads(words)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(str(key) in text for key in value)


def _holds_calls(text: str, message: Message) -> bool:
    functions = [cast("Mapping[str, object]", call["function"]) for call in message.get("tool_calls", [])]
    return all(str(function["name"]) in text for function in functions)
