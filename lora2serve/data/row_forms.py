"""The forms that rows come in, and why a value is no row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora2serve.config.schema import show
from lora2serve.data.message_forms import RowProblem, learned, read_messages, read_template_arguments, read_tools
from lora2serve.data.rows import ChatRow, CompletionRow, Row, TextRow

FORMS = "a row is {messages: [{role, content}, ...]}, {prompt, completion} or {text}"


def parse_row(value: object) -> Row | str:
    """The row, or why ``value`` is none. Keys of another form are left out."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__}, expected an object"
    filled = {key: item for key, item in value.items() if item is not None}
    read = _form(filled) or _form(value)
    if not read:
        return f"keys {', '.join(map(str, value)) or 'none'}, expected messages, prompt + completion, or text"
    try:
        return read(filled)
    except RowProblem as problem:
        return str(problem)


def _form(keys: Mapping[str, object]) -> Callable[[Mapping[str, object]], Row] | None:
    if "messages" in keys:
        return _chat
    if "prompt" in keys or "completion" in keys:
        return _pair
    return _text if "text" in keys else None


def _chat(value: Mapping[str, object]) -> Row:
    messages = read_messages("messages", value.get("messages"))
    if not learned(messages):
        raise RowProblem("messages has no assistant turn to learn from")
    tools = read_tools(value["tools"]) if "tools" in value else None
    arguments = read_template_arguments(value.get("chat_template_kwargs", {}))
    return ChatRow(messages, tools, arguments, _task(value))


def _pair(value: Mapping[str, object]) -> Row:
    prompt, completion = value.get("prompt"), value.get("completion")
    if not isinstance(prompt, str):
        raise RowProblem(f"prompt is {show(prompt)}, expected text")
    if not isinstance(completion, str):
        raise RowProblem(f"completion is {show(completion)}, expected text")
    if not completion:
        raise RowProblem("completion is empty")
    return CompletionRow(prompt, completion, _task(value))


def _text(value: Mapping[str, object]) -> Row:
    text = value.get("text")
    if not isinstance(text, str) or not text:
        raise RowProblem(f"text is {show(text)}, expected text")
    return TextRow(text, _task(value))


def _task(value: Mapping[str, object]) -> str:
    task = value.get("task")
    return task if isinstance(task, str) else ""
