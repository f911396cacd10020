"""A server that speaks as vLLM does, without a model: a real ASGI application on a real port, which breaks on demand.

It answers ``MODEL says WORDS``, a word a token, and counts what it was asked. ``Faults`` say what goes wrong.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class Faults:
    """What goes wrong from now on."""

    status: int = 0  # instead of an answer
    hang: bool = False  # no answer at all
    cut: int = 0  # end the connection after so many tokens
    error_event: int = 0  # an error as an event after so many tokens, as vLLM sends it, and then the usual end
    quiet_end: int = 0  # end the stream in order after so many tokens, without saying why
    compress: bool = False  # whole answers and streams, whoever asks
    load_status: int = 0  # of loading an adapter
    load_seconds: float = 0.0
    token_seconds: float = 0.0
    gate: threading.Event | None = None  # the rest of a stream waits for it, behind its first token
    waiting: int = 0  # what /metrics says of requests that wait


@dataclass
class StubUpstream:
    """Its state: which adapters it has, what it was asked."""

    models: tuple[str, ...] = ("base",)
    takes_adapters: bool = True
    faults: Faults = field(default_factory=Faults)
    adapters: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, Mapping[str, str], dict[str, Any]]] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)  # of these requests, behind the ? of their address
    calls: list[str] = field(default_factory=list)  # of loading and unloading
    left: list[str] = field(default_factory=list)  # models whose client left
    url: str = ""

    def asked(self, *, warm: bool = False) -> list[str]:
        """The models that were asked for, in order; without the one-token requests that warm them."""
        return [body["model"] for _, _, body in self.requests if warm or body.get("prompt") != "Hello"]

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        path, body = scope["path"], b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        content = json.loads(body) if body[:1] == b"{" else {}
        if path == "/v1/models":
            await answer(send, 200, {"object": "list", "data": self._entries()})
        elif path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            await self._adapters(path, content, send)
        elif path == "/metrics":
            text = f'# TYPE x gauge\nvllm:num_requests_waiting{{engine="0"}} {float(self.faults.waiting)}\n'
            await answer(send, 200, text.encode(), kind=b"text/plain")
        elif path == "/echo":
            await answer(send, 201, body, kind=b"application/octet-stream", extra=[(b"x-echo", scope["query_string"])])
        else:
            self.queries.append(scope["query_string"].decode())
            self.requests.append((path, headers, content))
            await self._complete(path, content, receive, send)

    def _entries(self) -> list[dict[str, Any]]:
        base = [{"id": name, "object": "model", "root": name, "parent": None} for name in self.models]
        return base + [{"id": name, "root": path, "parent": "base"} for name, path in self.adapters.items()]

    async def _adapters(self, path: str, content: Mapping[str, str], send: Send) -> None:
        name = content["lora_name"]
        self.calls.append(f"{path.rsplit('/', maxsplit=1)[-1].split('_', maxsplit=1)[0]} {name}")
        await asyncio.sleep(self.faults.load_seconds)
        if not self.takes_adapters:
            await answer(send, 404, {"detail": "Not Found"})
        elif self.faults.load_status:
            await answer(send, self.faults.load_status, error("it cannot be loaded", self.faults.load_status))
        elif path == "/v1/unload_lora_adapter":
            gone = self.adapters.pop(name, None)
            await answer(send, 200 if gone else 404, b"done" if gone else error("cannot be found", 404))
        elif name in self.adapters:
            await answer(send, 400, error(f"The lora adapter '{name}' has already been loaded.", 400))
        else:
            self.adapters[name] = content["lora_path"]
            await answer(send, 200, b"Success", kind=b"text/plain")

    async def _complete(self, path: str, content: Mapping[str, Any], receive: Receive, send: Send) -> None:
        model, faults = content.get("model", ""), self.faults
        if model not in (*self.models, *self.adapters):
            await answer(send, 404, error(f"The model `{model}` does not exist.", 404))
        elif faults.hang:
            await receive()
            self.left.append(model)
        elif faults.status:
            await answer(send, faults.status, error("broken", faults.status))
        else:
            text = content["messages"][-1]["content"] if "messages" in content else content.get("prompt", "")
            send = compressing(send) if faults.compress else send
            await self._words(path, content, f"{model} says {text}".split(), receive, send)

    async def _words(
        self, path: str, content: Mapping[str, Any], words: list[str], receive: Receive, send: Send
    ) -> None:
        chat, model = path.endswith("chat/completions"), content["model"]
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
        shared = {"id": "cmpl-1", "object": "completion", "created": 1, "model": model}
        if not content.get("stream"):
            text = " ".join(words)
            one = (
                {"index": 0, "message": {"role": "assistant", "content": text}} if chat else {"index": 0, "text": text}
            )
            await answer(send, 200, {**shared, "choices": [{**one, "finish_reason": "stop"}], "usage": usage})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        gone, gate = asyncio.ensure_future(receive()), self.faults.gate
        for number, word in enumerate(words):
            piece = word if number == 0 else f" {word}"
            part = {"delta": {"content": piece}} if chat else {"text": piece}
            finish = "stop" if number == len(words) - 1 else None
            await event(send, {**shared, "choices": [{"index": 0, **part, "finish_reason": finish}]})
            if self.faults.cut == number + 1:
                raise RuntimeError("cut off")
            if self.faults.quiet_end == number + 1:
                await send({"type": "http.response.body"})
                return
            if self.faults.error_event == number + 1:
                await event(send, error("the engine is dead", 500))
                break
            await asyncio.sleep(self.faults.token_seconds)
            while gate and not gate.is_set() and not gone.done():
                await asyncio.sleep(0.005)
            if gone.done():
                self.left.append(model)
                return
        gone.cancel()
        if (content.get("stream_options") or {}).get("include_usage"):
            await event(send, {**shared, "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def answer(
    send: Send, status: int, content: object, *, kind: bytes = b"application/json",
    extra: list[tuple[bytes, bytes]] | None = None,
) -> None:  # fmt: skip
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *(extra or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def compressing(send: Send) -> Send:
    """An answer in gzip, each part of it at once."""
    packer = zlib.compressobj(wbits=31)

    async def packed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [item for item in message["headers"] if item[0] != b"content-length"]
            await send({**message, "headers": [*headers, (b"content-encoding", b"gzip")]})
            return
        end = not message.get("more_body")
        data = packer.compress(message.get("body", b"")) + packer.flush(zlib.Z_FINISH if end else zlib.Z_SYNC_FLUSH)
        await send({**message, "body": data})

    return packed


async def event(send: Send, content: object) -> None:
    data = json.dumps(content, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def error(message: str, code: int) -> dict[str, object]:
    return {"error": {"message": message, "type": "Error", "param": None, "code": code}}


class _Hurried:
    """What uvicorn has of asyncio: whether it is to end it asks every tenth of a second, and waits as long before it does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


setattr(uvicorn.server, "asyncio", _Hurried())  # noqa: B010  # of this process, the gateway's servers too
_running: list[uvicorn.Server] = []


def end_all() -> None:
    """Ask all that run to end, before anybody waits for one of them: each takes a while."""
    for server in _running:
        server.should_exit = True


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """The address at which an ASGI application answers, until the block ends."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="auto", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        _running.append(server)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()
            _running.remove(server)


@contextmanager
def running_stub(stub: StubUpstream | None = None, port: int = 0) -> Iterator[StubUpstream]:
    """A stub that answers at its ``url``."""
    stub = stub or StubUpstream()
    with serving(stub, port) as url:
        stub.url = url
        yield stub
