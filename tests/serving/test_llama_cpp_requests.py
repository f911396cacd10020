"""What llama-cpp-python's server is given of a request: text, and only for the model that it serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lora2serve.serving.llama_cpp_requests import Message, Receive, RefusedRequest, RequestLayer, Send, accepted


def part(text: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([part("One"), part("two")], "One\ntwo"), (["One", part("two")], "One\ntwo"), ([part("One")], "One"), ([], ""),
        ([part("One", "input_text"), {"type": "refusal", "refusal": "No."}], "One\nNo."), (None, ""), ("One", "One"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_text(role: str, content: Any, text: str) -> None:
    message = {"role": role, "content": content, "tool_call_id": "x"}
    request = {"messages": [{"role": "user", "content": "Hi"}, message], "stream": True}
    assert accepted(request, "demo") == {**request, "messages": [request["messages"][0], {**message, "content": text}]}  # type: ignore[index]


def test_names() -> None:
    for name in ("demo", "", None):
        assert accepted({"model": name, "prompt": "x"}, "demo") == {"model": name, "prompt": "x"}
    assert accepted({}, "demo") == {}
    with pytest.raises(RefusedRequest, match=r"The model `gpt-4o` does not exist\. Valid aliases: demo\.") as raised:
        accepted({"model": "gpt-4o"}, "demo")
    error = {"message": str(raised.value), "type": "NotFoundError", "param": "model", "code": 404}
    assert json.loads(raised.value.body) == {"error": error}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "data:"}}, r"content\[1\] is of type `image_url`; this model reads text"),
        ({"type": "input_audio", "input_audio": {}}, "is of type `input_audio`"), ({"type": "text"}, "has no text"),
        ({"type": "text", "text": 7}, "has no text"), ({}, "has no text"), (7, "has no text"), ([], "has no text"),
    ],
)  # fmt: skip
def test_what_is_no_text(wrong: Any, message: str) -> None:
    request = {"messages": [{"role": "user", "content": [part("What is this?"), wrong]}]}
    with pytest.raises(RefusedRequest, match=message) as raised:
        accepted(request, "demo")
    assert json.loads(raised.value.body)["error"]["code"] == 400
    assert accepted(request, "demo", images=True) == request, "where a handler reads them"


def through(layer: RequestLayer, body: Sequence[bytes], headers: Mapping[str, str], path: str = "/v1/x") -> bytes:
    """The answer of a layer to a body that comes in pieces."""
    pieces = [{"type": "http.request", "body": piece, "more_body": True} for piece in body]
    pieces[-1]["more_body"] = False
    answers: list[Message] = []

    async def receive() -> Message:
        return pieces.pop(0)

    async def send(message: Message) -> None:
        answers.append(message)

    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope: Message = {"type": "http", "method": "POST", "path": path, "headers": listed}
    asyncio.run(layer(scope, receive, send))
    return b"".join(answer.get("body", b"") for answer in answers)


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """An application that answers with what it is asked."""
    message = await receive()
    length = dict(scope["headers"]).get(b"content-length", b"")
    assert length in (b"", str(len(message["body"])).encode())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def test_the_layer() -> None:
    layer = RequestLayer(echo, "demo", images=False)
    body = json.dumps({"messages": [{"role": "user", "content": [part("Où"), part("ça?")]}]}).encode()
    answer = json.loads(through(layer, [body[:20], body[20:]], {"content-length": str(len(body))}))
    assert answer == {"messages": [{"role": "user", "content": "Où\nça?"}]}
    for other in (b"{", b"[1]", b"", b"\xff", b"[" * 100_000):
        assert through(layer, [other], {}) == (b"[1]" if other == b"[1]" else other)
    assert b"NotFoundError" in through(layer, [b'{"model": "x"}'], {})


def test_a_key() -> None:
    """Who has none learns no names: the application refuses it."""
    layer = RequestLayer(echo, "demo", images=False, key="secret")
    assert through(layer, [b'{"model": "x"}'], {}) == b'{"model": "x"}'
    assert b"Valid aliases" in through(layer, [b'{"model": "x"}'], {"authorization": "Bearer secret"})
