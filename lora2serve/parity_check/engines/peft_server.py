"""``python -m lora2serve.parity_check.engines.peft_server``: an OpenAI-compatible server over transformers and PEFT.

For kinds of adapters that no other engine knows. It answers one request at a time; the others wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

from lora2serve.errors import EngineError, Lora2ServeError, first_line
from lora2serve.parity_check.engines.peft_requests import CHAT, COMPLETIONS, PeftRequest, read_request
from lora2serve.parity_check.engines.served_peft import Answered, ServedPeft, StoppedAnswer
from lora2serve.serving.llama_cpp_requests import Message, Receive, RefusedRequest, Send

MOST_BYTES = 16 << 20  # of a body
SHUTDOWN = 5  # seconds that an answer gets once the server is to end


class PeftApp:
    """The server as an ASGI application."""

    def __init__(self, models: ServedPeft) -> None:
        self._models, self._since = models, int(time.time())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        try:
            await self._request(str(scope["method"]), str(scope["path"]), receive, send)
        except RefusedRequest as error:
            await _send(send, error.status, error.body)
        except Lora2ServeError as error:
            await _send(send, HTTPStatus.BAD_REQUEST, RefusedRequest(error.message, None).body)

    async def _request(self, method: str, path: str, receive: Receive, send: Send) -> None:
        allowed = {"/health": "GET", "/v1/models": "GET", CHAT: "POST", COMPLETIONS: "POST"}.get(path)
        if allowed != method:
            status = HTTPStatus.METHOD_NOT_ALLOWED if allowed else HTTPStatus.NOT_FOUND
            raise RefusedRequest(f"{method} {path}: {status.phrase.lower()}", None, status)
        if path == "/health":
            await _send(send, HTTPStatus.OK, b"{}")
        elif path == "/v1/models":
            await _send(send, HTTPStatus.OK, json.dumps({"object": "list", "data": self._list()}).encode())
        else:
            try:
                content = json.loads(await _body(receive))
            except (ValueError, RecursionError) as error:
                raise RefusedRequest(f"The body is no JSON ({first_line(error)}).", "body") from None
            asked = read_request(path, content, self._models.models)
            answer = _Answer(self._models, asked, path)
            await (_stream(answer, receive, send) if asked.stream else _whole(answer, receive, send))

    def _list(self) -> list[dict[str, object]]:
        about = {"object": "model", "created": self._since, "owned_by": "lora2serve"}
        return [{"id": name, **about} for name in self._models.models]


class _Answer:
    """One answer that is made in a thread; iterating gives its pieces. ``leave`` ends it."""

    def __init__(self, models: ServedPeft, asked: PeftRequest, path: str) -> None:
        self.asked, self.path, self.ended = asked, path, Answered("stop", 0, 0)
        self.name, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._models, self._left = models, False
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._thread = asyncio.ensure_future(asyncio.to_thread(self._run))

    async def pieces(self) -> AsyncIterator[str]:
        """As they come; what went wrong is raised at the end."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        self.ended = await self._thread

    def leave(self) -> None:
        """Nobody wants the rest."""
        self._left = True

    def _run(self) -> Answered:
        try:
            asked = self.asked
            return self._models.answer(asked.model, asked.prompt, asked.options, asked.stops, self._say)
        except Lora2ServeError:
            raise
        except Exception as error:  # a library's own, such as no memory left: the next request may do
            raise EngineError(f"{type(error).__name__}: {first_line(error)}") from error
        finally:
            self._put(None)

    def _say(self, text: str) -> None:
        if self._left:
            raise StoppedAnswer
        if text:
            self._put(text)

    def _put(self, piece: str | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    @property
    def counts(self) -> dict[str, int]:
        prompt, tokens = self.ended.prompt_tokens, self.ended.tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def whole(self, text: str) -> dict[str, object]:
        """The answer in one piece."""
        said: dict[str, object] = {"text": text}
        if self.path == CHAT:
            said = {"message": {"role": "assistant", "content": text}}
        return {**self._form("", said, self.ended.end), "usage": self.counts}

    def chunk(self, text: str, end: str | None = None) -> dict[str, object]:
        """A piece of a stream, or its end."""
        said: dict[str, object] = {"text": text}
        if self.path == CHAT:
            said = {"delta": {"content": text} if end is None else {}}
        return self._form(".chunk", said, end)

    def first(self) -> dict[str, object]:
        """What says who speaks."""
        return self._form(".chunk", {"delta": {"role": "assistant", "content": ""}}, None)

    def _form(self, suffix: str, said: Mapping[str, object], end: str | None) -> dict[str, object]:
        kind = f"chat.completion{suffix}" if self.path == CHAT else "text_completion"
        choice = {"index": 0, **said, "finish_reason": end, "logprobs": None}
        about = {"id": self.name, "object": kind, "created": self.created, "model": self.asked.model}
        return {**about, "choices": [choice]}


async def _whole(answer: _Answer, receive: Receive, send: Send) -> None:
    with _watched(answer, receive):
        text = "".join([piece async for piece in answer.pieces()])
    await _send(send, HTTPStatus.OK, json.dumps(answer.whole(text)).encode())


async def _stream(answer: _Answer, receive: Receive, send: Send) -> None:
    """Server-sent events; an error before the first word has a status of its own."""

    async def event(content: Mapping[str, object]) -> None:
        body = f"data: {json.dumps(content)}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    begun = False
    try:
        with _watched(answer, receive):
            async for piece in answer.pieces():
                if not begun:
                    begun = await _begin(answer, send, event)
                await event(answer.chunk(piece))
        if not begun:
            await _begin(answer, send, event)
        await event(answer.chunk("", answer.ended.end))
        if answer.asked.counts:
            await event({**answer.chunk("", None), "choices": [], "usage": answer.counts})
    except Lora2ServeError as error:
        if not begun:
            raise
        refused = RefusedRequest(error.message, None, HTTPStatus.INTERNAL_SERVER_ERROR)
        await event(json.loads(refused.body))
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _begin(answer: _Answer, send: Send, event: Callable[[Mapping[str, object]], Awaitable[None]]) -> bool:
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if answer.path == CHAT:
        await event(answer.first())
    return True


@contextmanager
def _watched(answer: _Answer, receive: Receive) -> Iterator[None]:
    """A client that leaves ends its answer, so that the next one begins; so does a server that ends."""
    watcher = asyncio.ensure_future(_watch(answer, receive))
    try:
        yield
    finally:
        answer.leave()
        watcher.cancel()


async def _watch(answer: _Answer, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.leave()


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        event = await receive()
        part = event.get("body", b"")
        body += part if isinstance(part, bytes) else b""
        more = bool(event.get("more_body"))
        if len(body) > MOST_BYTES:
            raise RefusedRequest(f"The body has over {MOST_BYTES} bytes.", "body", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    return body


async def _send(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def main() -> None:
    """Serve until a signal ends it. ``--adapters`` is a JSON object: name -> directory."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="lora2serve serve --engine peft", allow_abbrev=False)
    for name in ("--base", "--adapters", "--host"):
        parser.add_argument(name, required=True)
    parser.add_argument("--port", type=int, required=True)
    words = parser.parse_args()
    try:
        models = ServedPeft(words.base, json.loads(words.adapters))
    except Lora2ServeError as error:
        raise SystemExit(f"EngineError: {error.message}") from None
    settings = {"host": words.host, "port": words.port, "timeout_graceful_shutdown": SHUTDOWN}
    uvicorn.run(PeftApp(models), **settings, log_level="warning")


if __name__ == "__main__":
    main()
