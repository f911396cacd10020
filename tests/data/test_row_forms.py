"""Conversations in their variants: tools, calls, parts of content, weights, and what is refused of them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow
import pytest

from lora2serve.data.row_forms import RowReader, as_conversation, parse_row
from lora2serve.data.rows import ChatRow, CompletionRow, TextRow

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


def test_nulls_of_tools_and_arguments() -> None:
    """Those of a JSON text stay; others may be what Arrow filled in: they go, which is told where it was not Arrow."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {"default": None, "x": 1}}}
    call = {"type": "function", "function": {"name": "now", "arguments": {"at": None}}}
    objects = {"messages": [USER, {**ANSWER, "tool_calls": [call]}], "tools": [tool]}
    as_text = {**call, "function": {"name": "now", "arguments": json.dumps({"at": None})}}
    texts = {"messages": [USER, {**ANSWER, "tool_calls": [as_text]}], "tools": json.dumps([tool])}
    shared = [{"from": "function_call", "value": json.dumps({"name": "now", "arguments": {"at": None}})}]
    kept = chat(texts)
    assert kept.tools == [tool] and kept.messages[1]["tool_calls"][0]["function"] == call["function"]
    assert chat({"conversations": shared}).messages[0]["tool_calls"] == kept.messages[1]["tool_calls"]
    assert parse_row(json.loads(json.dumps(kept.json()))) == kept, "as they are written, too"
    dropped = chat(objects)
    assert dropped.tools == [{"type": "function", "function": {"name": "now", "parameters": {"x": 1}}}]
    assert dropped.messages[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}
    for value, filled, count in ((objects, False, 1), (objects, True, 0), (texts, False, 0)):
        reader = RowReader(filled=filled)
        reader.read(value)
        assert reader.unread.total() == count


REFUSED = [
    ({"text": None, "txet": "a typo"}, "keys txet, expected messages, prompt + completion, or text"),
    ({"text": None}, "text is None, expected text"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages has no assistant turn to learn from"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight is 0.5, expected 0 or 1"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is None, expected text"),
    ({"messages": [USER, {**ANSWER, "content": [{"type": "image"}]}]}, "messages[1].content[0].type is 'image'"),
    ({"messages": [USER, ANSWER], "images": ["cat.png"]}, "images: rows with images, sound or films are not trained"),
    ({"image": "cat.png", "conversations": [{"from": "human", "value": "<image> What?"}]}, "image: rows with images"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": 3}]}]}, "messages[1].tool_calls[0] is {'name': 3}"),
    ({"messages": [USER, ANSWER], "tools": [{"name": None}]}, "tools[0] is {}, expected"),
    ({"messages": [USER, ANSWER], "tools": "[{"}, "tools is '[{', not JSON"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "chat_template_kwargs is [1], expected an object"),
    (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1, "chat_template": "b"}},
        "chat_template_kwargs.chat_template: a server sets it",
    ),
    (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "a", "arguments": '{"b": "\\ud83d"}'}]}]},
        'messages[1].tool_calls[0].function.arguments is \'{"b": "\\\\ud83d"}\', not JSON (half of a surrogate pair',
    ),
]


@pytest.mark.parametrize(("value", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_refused(value: dict[str, Any], reason: str) -> None:
    problem = parse_row(value)
    assert isinstance(problem, str)
    assert problem.startswith(reason)


def test_a_row_whose_images_are_none() -> None:
    """Of a set for models that see, the rows that are text are rows."""
    for none in (None, [], ""):
        assert parse_row({"text": "a", "images": none}) == TextRow("a")


def test_one_that_is_nested_too_deeply() -> None:
    deep: Any = {}
    for _ in range(90):
        deep = [deep]
    assert isinstance(parse_row({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": deep}}), ChatRow)
    for _ in range(1000):
        deep = [deep]
    problem = parse_row({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": deep}})
    assert problem == "chat_template_kwargs is nested more than 100 deep"


PLAIN = [USER, ANSWER]
TEXTS = (USER["content"], ANSWER["content"])
SAME_CHAT: list[dict[str, Any]] = [
    {"messages": PLAIN},
    {"messages": json.dumps(PLAIN)},
    {"conversations": PLAIN},
    {"conversations": [{"from": "human", "value": TEXTS[0]}, {"from": "gpt", "value": TEXTS[1]}]},
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": TEXTS[0], "completion": [ANSWER]},
    {"prompt": TEXTS[0], "completion": TEXTS[1]},
    {"prompt": TEXTS[0], "response": TEXTS[1], "text": None},
    {"instruction": TEXTS[0], "output": TEXTS[1], "input": ""},
    {"instruction": "Weather", "input": "in Oslo?", "output": TEXTS[1]},
    {"question": TEXTS[0], "answer": TEXTS[1]},
]


@pytest.mark.parametrize("value", SAME_CHAT, ids=[", ".join(value) for value in SAME_CHAT])
def test_forms_of_one_conversation(value: dict[str, Any]) -> None:
    row = parse_row(value)
    turns = list((as_conversation(row) if isinstance(row, CompletionRow) else row).messages)
    if value.get("input"):
        turns[0]["content"] = turns[0]["content"].replace("\n", " ")
    assert turns == PLAIN


def test_a_pair_with_what_only_a_conversation_has() -> None:
    pair = {"question": TEXTS[0], "answer": TEXTS[1]}
    assert list(chat({**pair, "system": "Be brief."}).messages) == [{"role": "system", "content": "Be brief."}, *PLAIN]
    assert chat({**pair, "tools": [FUNCTION]}).tools
    assert isinstance(parse_row({**pair, "system": "", "tools": []}), CompletionRow), "the control: both are empty"


def test_turns_of_a_prompt_are_not_learned() -> None:
    row = chat({"prompt": [*PLAIN, USER], "completion": [ANSWER]})
    assert list(row.messages) == [USER, {**ANSWER, "weight": 0}, USER, ANSWER]


def test_sharegpt_calls_a_function() -> None:
    turns = [
        {"from": "human", "value": TEXTS[0]},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": TEXTS[1]},
    ]
    row = chat({"conversations": turns, "system": "S", "tools": json.dumps([FUNCTION])})
    tool = {"role": "tool", "content": "rain"}
    assert list(row.messages) == [{"role": "system", "content": "S"}, USER, CALLING, tool, ANSWER]
    assert row.tools == [{"type": "function", "function": FUNCTION}]


def test_columns_and_what_nobody_reads() -> None:
    reader = RowReader({"prompt": "query", "completion": "reply", "tools": "functions"})
    row = reader.read({"query": TEXTS[0], "reply": TEXTS[1], "id": 7, "messages": PLAIN, "note": None})
    assert row == CompletionRow(*TEXTS), "what is mapped comes first"
    assert (reader.unread, reader.present) == ({"id": 1, "messages": 1}, {"prompt", "completion"})
    turns = [{"speaker": "Human", "said": TEXTS[0]}, {"speaker": "gpt", "said": TEXTS[1]}]
    row = RowReader({"messages": "log", "role": "speaker", "content": "said"}).read({"log": turns})
    assert row == ChatRow(PLAIN)


def test_what_arrow_fills_in() -> None:
    """Rows of several shapes through one table, whose columns and structs are filled up with None."""
    tools = [{**CALL, "function": FUNCTION}, {"type": "function", "function": {"name": "stop", "description": "Stop"}}]
    other = {"function": {"name": "stop", "arguments": {"why": "done"}}}
    values = [
        {"messages": PLAIN},
        {
            "messages": [USER, CALLING, {"role": "tool", "content": "rain", "name": "get_weather"}, ANSWER],
            "tools": tools,
        },
        {"messages": [USER, {"role": "assistant", "tool_calls": [other]}], "tools": tools[1:], "task": "stop"},
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "thinking": "Hm."}]},
    ]
    columns = ("messages", "tools", "task")  # Arrow takes them from the first row
    through_arrow = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in values]).to_pylist()
    assert through_arrow != values, "the control: Arrow has filled in"
    assert [parse_row(value) for value in through_arrow] == [parse_row(value) for value in values]
