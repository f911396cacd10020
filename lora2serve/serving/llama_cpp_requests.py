"""Requests for chats as llama-cpp-python's server does not take them, in the form that it takes.

Its schema wants text as the content of most messages, its templates do so for all of them, and any name of a model gets
the one that is loaded. vLLM and llama-server join the texts of a list by newlines, and refuse a name that they do not
serve; so does this layer (ASGI), in vLLM's words.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from lora2serve.system.json_values import Json, JsonValue, at

TEXT_KEYS = {  # type of a part -> the key of its text (MM_PARSER_MAP of vLLM's renderers/chat_utils.py)
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking",
}  # fmt: skip
Message = MutableMapping[str, Any]  # what an ASGI server and its application send each other
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class RefusedRequest(Exception):
    """A request that gets an error, with the key of it that is wrong; None where it is no key."""

    def __init__(self, message: str, param: str | None, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.param, self.status = param, status

    @property
    def body(self) -> bytes:
        """The answer: OpenAI's error, as vLLM fills it in."""
        kind = "NotFoundError" if self.status == HTTPStatus.NOT_FOUND else "BadRequestError"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.status.value}
        return json.dumps({"error": error}).encode()


def accepted(request: Json, model: str, *, images: bool = False) -> Json:
    """The request as the server takes it. ``images``: parts that are not text are left for a handler that reads them.

    Raises RefusedRequest for another ``model``, and for parts that the model cannot read.
    """
    named = request.get("model")
    if named and isinstance(named, str) and named != model:
        raise RefusedRequest(
            f"The model `{named}` does not exist. Valid aliases: {model}.", "model", HTTPStatus.NOT_FOUND
        )
    messages = request.get("messages")
    if images or not isinstance(messages, list):
        return request
    return {**request, "messages": [_with_text(message, f"messages[{n}]") for n, message in enumerate(messages)]}


def _with_text(message: JsonValue, place: str) -> JsonValue:
    """A message whose content is text: joined from a list, empty where there is none."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        texts = [_text(part, f"{place}.content[{n}]") for n, part in enumerate(content)]
        return {**message, "content": "\n".join(texts)}
    return {**message, "content": ""} if content is None else message


def _text(part: JsonValue, place: str) -> str:
    kind = at(part, "type")
    text = part if isinstance(part, str) else at(part, TEXT_KEYS.get(str(kind), ""))
    if isinstance(text, str):
        return text
    if isinstance(kind, str) and kind not in TEXT_KEYS:
        raise RefusedRequest(f"{place} is of type `{kind}`; this model reads text only.", "messages")
    raise RefusedRequest(f"{place} has no text.", "messages")


class RequestLayer:
    """Between an ASGI server and ``application``. A request without the ``key`` is left for it to refuse."""

    def __init__(self, application: Application, model: str, *, images: bool, key: str | None = None) -> None:
        self._application, self._model, self._images = application, model, images
        self._authorization = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        known = self._authorization in (None, headers.get(b"authorization"))
        if scope["type"] != "http" or scope["method"] != "POST" or not known:
            await self._application(scope, receive, send)
            return
        body = await _whole(receive)
        try:
            content = json.loads(body)
            if isinstance(content, dict):
                body = json.dumps(accepted(content, self._model, images=self._images)).encode()
        except RefusedRequest as error:
            await _answer(send, error)
            return
        except (ValueError, RecursionError):
            pass  # not JSON: the application says so
        length = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*length, (b"content-length", str(len(body)).encode())]}
        await self._application(scope, _replayed(body, receive), send)


async def _whole(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the server sends: that the client is gone."""
    left = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return again


async def _answer(send: Send, error: RefusedRequest) -> None:
    length = str(len(error.body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": error.status.value, "headers": headers})
    await send({"type": "http.response.body", "body": error.body})
