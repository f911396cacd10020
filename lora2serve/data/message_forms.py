"""Conversations as people have them, as ``Message``s: OpenAI's form and ShareGPT's, tools and calls in their variants.

A key whose value is null is as if it were not there: Arrow fills every row up with the keys of all others. Where a list
or an object is expected, a text is read as JSON, because that is how it stands in CSV and in many columns of the Hub.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import cast

from lora2serve.config.schema import show
from lora2serve.data.rows import ROLES, THOUGHT_KEYS, Message
from lora2serve.data.text_readers import without_half_pairs

TEXT_ALONE = "rows with images, sound or films are not trained"
DEEPEST = 100  # lists and objects inside each other
TEXT_KEYS = ("name", "tool_call_id", *THOUGHT_KEYS)
OF_THE_SERVER = (  # what it says itself when it calls a template, or refuses in a request
    "messages", "conversation", "conversations", "tools", "chat_template", "tokenize", "add_generation_prompt",
    "continue_final_message", "strftime_now", "raise_exception",
)  # fmt: skip
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


class RowProblem(ValueError):
    """Why a value is no row, in one line."""


def read_messages(key: str, value: object, names: Mapping[str, str]) -> list[Message]:
    """The turns of a conversation; RowProblem with the place in it, such as ``messages[2].role``.

    ``names`` are other names of ``role`` and ``content`` in a turn, whose roles may be ShareGPT's, too.
    """
    turns = from_json(key, value)
    if not isinstance(turns, list) or not turns:
        raise RowProblem(f"{key} is empty or not a list")
    return [_message(f"{key}[{number}]", _renamed(turn, names)) for number, turn in enumerate(turns)]


def read_tools(value: object) -> list[dict[str, object]] | None:
    """OpenAI's ``{"type": "function", "function": {...}}`` each; a bare function gets that around it.

    Nulls inside a text stay: a default may be one.
    """
    tools = (
        _checked("tools", _parsed("tools", value), nulls=True) if isinstance(value, str) else from_json("tools", value)
    )
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem(f"tools is {show(tools)}, expected a list of objects")
    return [_tool(tool, number) for number, tool in enumerate(tools)] or None


def read_template_arguments(value: object) -> dict[str, object]:
    """What a row gives to the chat template beside its messages."""
    arguments = from_json("chat_template_kwargs", value)
    if not isinstance(arguments, dict):
        raise RowProblem(f"chat_template_kwargs is {show(arguments)}, expected an object")
    if taken := [name for name in OF_THE_SERVER if name in arguments]:
        raise RowProblem(f"chat_template_kwargs.{taken[0]}: a server sets it, expected variables of the template")
    return arguments


def from_json(key: str, value: object) -> object:
    """``value`` without nulls, read as JSON first where it is a text."""
    if isinstance(value, str):
        value = _parsed(key, value)
    return _checked(key, value)


def drops_nulls(value: Mapping[str, object], key: str) -> bool:
    """Whether a row has nulls in its tools, or in what the turns under ``key`` call them with, that are left out."""
    turns = value.get(key)
    calls = [turn.get("tool_calls") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return any(_holds_null(part) for part in (value.get("tools"), *calls))


def _holds_null(value: object) -> bool:
    if isinstance(value, dict):
        return any(item is None or _holds_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_holds_null, value))


def _parsed(key: str, text: str) -> object:
    try:
        return without_half_pairs(json.loads(text), text)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"{key} is {show(text)}, not JSON ({error})") from None


def _checked(key: str, value: object, depth: int = 0, *, nulls: bool = False) -> object:
    """``value`` as JSON has it, with its ``nulls`` or without; RowProblem where it is too deep."""
    if depth > DEEPEST:
        raise RowProblem(f"{key} is nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        texts = {str(name): item for name, item in value.items() if nulls or item is not None}
        return {name: _checked(key, item, depth + 1, nulls=nulls) for name, item in texts.items()}
    if isinstance(value, list | tuple):
        return [_checked(key, item, depth + 1, nulls=nulls) for item in value]
    is_json = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_json or value is None else str(value)  # Arrow knows times, too


def _renamed(turn: object, names: Mapping[str, str]) -> object:
    known = {names.get("role", "from"): "from", names.get("content", "content"): "content"}
    return {known.get(key, key): value for key, value in turn.items()} if isinstance(turn, dict) else turn


def _message(place: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(f"{place} is {show(turn)}, expected an object")
    if "from" in turn and "role" not in turn:
        turn = _from_sharegpt(place, turn)
    role = turn.get("role")
    if role not in ROLES:
        raise RowProblem(f"{place}.role is {show(role)}, expected one of {', '.join(ROLES)}")
    message: dict[str, object] = {"role": role, "content": _content(place, turn.get("content")), **_others(turn)}
    for key in TEXT_KEYS:
        if not isinstance(message.get(key, ""), str):
            raise RowProblem(f"{place}.{key} is {show(message[key])}, expected text")
    calls = _tool_calls(place, turn)
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        raise RowProblem(f"{place}.content is None, expected text")
    if _weight(place, turn) == 0 and role == "assistant":
        message["weight"] = 0
    return cast("Message", message)


def _others(turn: Mapping[str, object]) -> dict[str, object]:
    """What goes to the template as it is."""
    return {k: v for k, v in turn.items() if k not in ("role", "content", "tool_calls", "function_call", "weight")}


def _content(place: str, content: object) -> str | None:
    """Text; the parts of a list in lines, as servers join them for a template that takes text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem(f"{place}.content is {show(content)}, expected text")
    texts = []
    for number, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise RowProblem(f"{place}.content[{number}].type is {show(kind)}, expected text: {TEXT_ALONE}")
        if not isinstance(text, str):
            raise RowProblem(f"{place}.content[{number}] is {show(part)}, expected text")
        texts.append(text)
    return "\n".join(texts)


def _weight(place: str, turn: Mapping[str, object]) -> object:
    weight = turn.get("weight", 1)
    if weight not in (0, 1):
        raise RowProblem(f"{place}.weight is {show(weight)}, expected 0 or 1")
    return weight


def _from_sharegpt(place: str, turn: Mapping[str, object]) -> dict[str, object]:
    """``{"from", "value"}`` as ``{"role", "content"}``."""
    origin, value = turn["from"], turn.get("value", turn.get("content"))
    role = SHAREGPT_ROLES.get(origin.lower()) if isinstance(origin, str) else None
    if role is None:
        raise RowProblem(f"{place}.from is {show(origin)}, expected one of {', '.join(SHAREGPT_ROLES)}")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value", "content")}
    if origin == "function_call":
        calls = _parsed(f"{place}.value", value) if isinstance(value, str) else value
        calls = [_with_arguments_as_text(call) for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": role, "tool_calls": calls, **rest}
    return {"role": role, "content": value, **rest}


def _with_arguments_as_text(call: object) -> object:
    """In which nulls stay."""
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return call
    return {**call, "arguments": json.dumps(call["arguments"])}


def _tool_calls(place: str, turn: Mapping[str, object]) -> list[dict[str, object]]:
    calls = from_json(f"{place}.tool_calls", turn.get("tool_calls", []))
    calls = [turn["function_call"]] if not calls and turn.get("function_call") else calls
    if not isinstance(calls, list):
        raise RowProblem(f"{place}.tool_calls is {show(calls)}, expected a list")
    return [_tool_call(f"{place}.tool_calls[{number}]", call) for number, call in enumerate(calls)]


def _tool_call(place: str, call: object) -> dict[str, object]:
    """OpenAI's form, whose arguments are an object, as servers give it to a template."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(f"{place} is {show(call)}, expected {{function: {{name, arguments}}}}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parsed(f"{place}.function.arguments", arguments)  # nulls inside a text stay
    if not isinstance(arguments, dict):
        raise RowProblem(f"{place}.function.arguments is {show(arguments)}, expected an object")
    whole: dict[str, object] = {} if function is call else call
    kind = {} if "type" in whole else {"type": "function"}
    return {**kind, **whole, "function": {**function, "arguments": arguments}}


def _tool(tool: Mapping[str, object], number: int) -> dict[str, object]:
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(f"tools[{number}] is {show(tool)}, expected {{type: function, function: {{name, ...}}}}")
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(function)}


def learned(messages: Sequence[Message]) -> bool:
    """Whether there is a turn of the assistant to learn from."""
    return any(message["role"] == "assistant" and message.get("weight", 1) for message in messages)
