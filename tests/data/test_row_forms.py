"""Conversations in their variants: tools, calls, parts of content, weights, and what is refused of them."""

from __future__ import annotations

from typing import Any

import pytest

from lora2serve.data.row_forms import parse_row
from lora2serve.data.rows import ChatRow

USER = {"role": "user", "content": "Weather in Oslo?"}
ANSWER = {"role": "assistant", "content": "Rain."}
FUNCTION = {"name": "get_weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def chat(value: dict[str, Any]) -> ChatRow:
    row = parse_row(value)
    assert isinstance(row, ChatRow), row
    assert parse_row(row.json()) == row, "what is written reads as the same row"
    return row


def test_what_a_row_holds_beside_its_messages() -> None:
    tool = {"type": "function", "function": FUNCTION}
    row = chat({"messages": [USER, ANSWER], "tools": [tool], "chat_template_kwargs": {"a": True}, "task": "weather"})
    assert (row.tools, row.chat_template_kwargs, row.task) == ([tool], {"a": True}, "weather")
    assert chat({"messages": [USER, ANSWER], "tools": [FUNCTION]}).tools == [tool], "a bare function"
    assert chat({"messages": [USER, ANSWER]}).tools is None


def test_tool_calls_in_their_variants() -> None:
    as_text = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    for call in (CALL, as_text, CALL["function"]):
        row = chat({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
        assert list(row.messages) == [USER, CALLING]
    old = {"role": "assistant", "content": None, "function_call": as_text["function"]}
    assert list(chat({"messages": [USER, old]}).messages) == [USER, CALLING]
    null = {"function": {"name": "get_weather", "arguments": '{"city": null}'}}
    row = chat({"messages": [USER, {"role": "assistant", "tool_calls": [null]}]})
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": None}}


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Oslo?"}]
    row = chat({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert row.messages[0]["content"] == "Weather\nin Oslo?"


def test_a_turn_that_is_not_learned() -> None:
    row = chat({"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]})
    assert list(row.messages) == [USER, {**ANSWER, "weight": 0}, USER, ANSWER]


REFUSED = [
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages has no assistant turn to learn from"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight is 0.5, expected 0 or 1"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is None, expected text"),
    ({"messages": [USER, {**ANSWER, "content": [{"type": "image"}]}]}, "messages[1].content[0].type is 'image'"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": 3}]}]}, "messages[1].tool_calls[0] is {'name': 3}"),
    ({"messages": [USER, ANSWER], "tools": [{"name": None}]}, "tools[0] is {}, expected"),
    ({"messages": [USER, ANSWER], "tools": "[{"}, "tools is '[{', not JSON"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "chat_template_kwargs is [1], expected an object"),
]


@pytest.mark.parametrize(("value", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_refused(value: dict[str, Any], reason: str) -> None:
    problem = parse_row(value)
    assert isinstance(problem, str)
    assert problem.startswith(reason)


def test_one_that_is_nested_too_deeply() -> None:
    deep: Any = {}
    for _ in range(90):
        deep = [deep]
    assert isinstance(parse_row({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": deep}}), ChatRow)
    for _ in range(1000):
        deep = [deep]
    problem = parse_row({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": deep}})
    assert problem == "chat_template_kwargs is nested more than 100 deep"
