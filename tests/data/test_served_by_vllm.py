"""What is trained before each answer is what vLLM gives to its engine: ten templates, conversations with tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from jinja2.exceptions import TemplateError

from lora2serve.data.row_forms import parse_row
from lora2serve.data.rows import ChatRow
from tests.data.test_chat_turns import ENDS, TURNS, learned, renderer, tokenizer_with
from tests.support.llama_cpp_source import chat_templates

pytestmark = pytest.mark.engine

# Template -> the token that ends its turns.
TEMPLATES = {
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>", "Qwen-Qwen3-0.6B": "<|im_end|>", "Qwen3.5-4B": "<|im_end|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>", "google-gemma-4-31B-it": "<turn|>", "GLM-4.6": "<|user|>",
    "ibm-granite-granite-4.0": "<|end_of_text|>", "Qwen3-Coder": "<|im_end|>", "MiniMax-M2": "[e~[",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "<|im_end|>",
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
BARE = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
STRICT = {"function": {**WEATHER["function"], "name": "forecast", "strict": True}, "type": "function"}  # type: ignore[dict-item]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What vLLM sets for its platform in this process is not left to other tests, whose workers would not be forked."""
    with patch.dict(os.environ):
        yield


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(
    *arguments: dict[str, Any], text: str | None = None, name: str = "get_weather", **more: Any
) -> dict[str, Any]:
    """A turn that calls a tool once for each of ``arguments``, as OpenAI's API writes it."""
    made = [
        {"id": f"call{n:05}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        for n, given in enumerate(arguments)
    ]
    return says(text, tool_calls=made, **more)


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": "get_weather", "content": text}


OPTIONAL = {  # as pydantic writes what may be left out
    "type": "function",
    "function": {
        "name": "at",
        "description": None,
        "parameters": {
            "type": "object",
            "properties": {"hour": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}},
        },
    },
}


OSLO, BERGEN = {"city": "Oslo"}, {"city": "Bergen"}
ASK, RAIN = user("Weather in Oslo?"), result('{"sky": "rain"}')
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    ([ASK, calls(OSLO)], [WEATHER]),
    ([ASK, calls(OSLO), RAIN, says("Rain.")], [WEATHER]),
    ([ASK, calls(OSLO), RAIN, says("Rain."), user("And Bergen?"), calls(BERGEN), RAIN, says("Rain, too.")], [WEATHER]),
    ([user("Both?"), calls(OSLO, BERGEN), RAIN, result("sun", 1), says("Rain and sun.")], [WEATHER]),
    ([{"role": "system", "content": "Be brief."}, ASK, calls(OSLO), RAIN, says("Rain.")], [WEATHER]),
    ([ASK, calls(OSLO, text="Let me look."), RAIN, says("Rain.")], [WEATHER]),
    ([ASK, calls(OSLO, reasoning_content="They want Oslo."), RAIN, says("Rain.")], [WEATHER]),
    ([ASK, calls(OSLO), RAIN, says("Rain.", reasoning_content="It says rain.")], [WEATHER]),
    ([ASK, calls(OSLO, reasoning_content="One."), RAIN, says("Rain.", reasoning_content="Two."), user("Thanks"),
      says("Bye.", reasoning_content="Three.")], [WEATHER]),
    ([user("What time is it?"), calls({}, name="now"), result("12:00"), says("Noon.")], [BARE]),
    ([ASK, calls(OSLO), RAIN, says("Rain.")], [WEATHER, BARE, STRICT]),
    ([ASK, calls({"city": "Tromsø \"north\"", "days": 3, "units": None, "deep": {"a": [1, 2.5, True]}})], [WEATHER]),
    ([ASK, says("Hello, no tool needed.")], [WEATHER]),
    ([ASK, says("First."), user("Now look."), calls(OSLO), RAIN, says("Rain.")], [WEATHER]),
    ([ASK, calls(OSLO), RAIN, calls(BERGEN), RAIN, says("Rain in both.")], [WEATHER]),
    ([ASK, calls(OSLO, text=""), result("rain\n\nand wind"), says("Rain and wind.")], [WEATHER]),
    ([ASK, calls(OSLO), result("東京 ☔"), says("雨")], [WEATHER]),
    ([user([{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]), calls(OSLO), RAIN, says("x")], [WEATHER]),  # type: ignore[arg-type]
    ([ASK, says("Not this one.", weight=0), user("Again"), calls(OSLO), RAIN, says("Rain.")], [WEATHER]),
    ([ASK, calls(OSLO), RAIN, says("Rain."), user("Bye"), says("Bye.")], [STRICT]),
    ([user("When?"), calls({"hour": None}, name="at"), result("now"), says("Now.")], [OPTIONAL]),
]  # fmt: skip


@pytest.fixture(scope="module")
def vllm() -> Any:
    from tests.support.vllm_renderer import VllmRenderer

    return VllmRenderer


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_vllm(name: str, vllm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    tokenizer = tokenizer_with(chat_templates()[name])
    server, writer = vllm(tokenizer), renderer(tokenizer, ENDS.get(name, TEMPLATES[name]))
    refused = []
    for messages, tools in [([dict(turn) for turn in TURNS], None), *CONVERSATIONS]:
        row = parse_row({"messages": messages, **({"tools": json.dumps(tools)} if tools else {})})
        assert isinstance(row, ChatRow)
        answers = [n for n, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1)]
        try:
            served = [server.prompt_ids(json.loads(json.dumps(messages[:n])), tools) for n in answers]
        except VLLMValidationError as problem:  # what nobody can serve is not trained either
            with pytest.raises(TemplateError, match="single tool-calls"):
                writer.render(row)
            refused.append(str(problem))
            continue
        rendered = writer.render(row)
        runs = learned(rendered.samples)
        assert [before for before, _ in runs] == served, messages
        for (_, ids), number in zip(runs, answers, strict=True):
            answer, text = messages[number], tokenizer.decode(ids)
            content = answer["content"] or ""
            assert content in text or "an answer that is learned" in rendered.losses  # Llama 3.1, beside a call
            for call in answer.get("tool_calls", []):
                assert call["function"]["name"] in text
                assert all(str(key) in text for key in json.loads(call["function"]["arguments"]))
    assert len(refused) == (1 if "Llama-3.1" in name else 0), refused


def test_the_control(vllm: Any) -> None:
    """The comparison sees a tool that is left out, and one whose keys stand in another order."""
    tokenizer = tokenizer_with(chat_templates()["Qwen-Qwen2.5-7B-Instruct"])
    server, writer = vllm(tokenizer), renderer(tokenizer, "<|im_end|>")
    messages, tools = CONVERSATIONS[0]
    row = parse_row({"messages": messages})
    assert isinstance(row, ChatRow)
    ((before, _),) = learned(writer.render(row).samples)
    assert before != server.prompt_ids(messages[:1], tools)
    plain = tokenizer.apply_chat_template(messages[:1], tools=[STRICT], add_generation_prompt=True, return_dict=False)
    assert list(plain) != server.prompt_ids(messages[:1], [STRICT])
    row = parse_row({"messages": messages, "tools": [OPTIONAL]})
    assert isinstance(row, ChatRow), "whose nulls might be those of a table"
    ((before, _),) = learned(writer.render(row).samples)
    assert before != server.prompt_ids(messages[:1], [OPTIONAL])
