"""The client's side of a request: its body, whether it is still there, and what it is told where there is no answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from types import TracebackType

from lora2serve.gateway.upstreams import Headers, Message, Receive, Send

PATIENCE = 60.0  # seconds between two parts of a body: who sends none holds one of the requests that may be at once


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class BodyRefused(Exception):
    """A body that is too large, nested too deep, or does not come."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def too_large(limit: int) -> BodyRefused:
    """For a body over the limit, in bytes."""
    return BodyRefused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: over {limit} bytes")


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body; BodyRefused, ClientLeft."""
    parts, size = list[bytes](), 0
    while True:
        try:
            async with asyncio.timeout(PATIENCE):
                message = await receive()
        except TimeoutError:
            raise BodyRefused(HTTPStatus.REQUEST_TIMEOUT, f"body: nothing came for {PATIENCE:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body = message.get("body", b"")
        assert isinstance(body, bytes)
        size += len(body)
        if size > limit:
            raise too_large(limit)
        parts.append(body)
        if not message.get("more_body"):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` of a request whose body was read, as if it was not."""
    unread = [body]

    async def again() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return again


class ClientWatch:
    """``async with``: ClientLeft in the block once the client leaves. ``ended``: all of the answer is on its way."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.ended, self._left = receive, False, False

    async def __aenter__(self) -> ClientWatch:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._watcher = task, asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        if kind is asyncio.CancelledError and self._left:
            self._task.uncancel()
            raise ClientLeft from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.ended:  # a server says the same of an answer that is complete
            self._left = True
            self._task.cancel()


async def send_error(send: Send, status: int, message: str, *, own: Headers = ()) -> None:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "upstream_error"
    await send_json(send, status, {"error": {"message": message, "type": kind, "param": None, "code": status}}, own=own)


async def send_json(send: Send, status: int, content: Mapping[str, object], *, own: Headers = ()) -> None:
    """A JSON object."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *own]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
