"""The servers behind a gateway, as it speaks to them: over HTTP, or inside the same process."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias
from urllib.parse import quote

from lora2serve.errors import EngineError
from lora2serve.gateway.gateway_config import UpstreamConfig
from lora2serve.gateway.request_record import CUT_OFF, REFUSED, TIMEOUT

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

# ASGI, as uvicorn and vLLM speak it
Scope: TypeAlias = MutableMapping[str, object]
Message: TypeAlias = MutableMapping[str, object]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

CONNECT = 5.0  # seconds to get a connection
KEEP = 2.0  # seconds to keep an idle connection: servers close theirs after 5
AWAY = 1.0  # seconds in which a server that was gone is asked only where there is no other
HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
}  # fmt: skip


class UpstreamError(EngineError):
    """A server that gave no answer, or not all of it; ``kind`` is that of ``RequestRecord.error``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message, "see whether that server runs")
        self.kind = kind


@dataclass(frozen=True)
class UpstreamAnswer:
    """The head of an answer, and its body as it comes. ``close`` ends it, and what the server does for it."""

    status: int
    headers: Headers
    chunks: AsyncIterator[bytes]
    close: Callable[[], None]

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([chunk async for chunk in self.chunks])


class Upstream(Protocol):
    """A server."""

    name: str
    config: UpstreamConfig

    @property
    def away(self) -> bool:
        """Whether it was gone a moment ago."""
        ...

    async def send(self, method: str, target: str, headers: Headers, body: bytes | None) -> UpstreamAnswer:
        """The answer to a request, once its head is there; UpstreamError where none comes.

        target: path and query, as they stand in the request.
        """
        ...

    async def close(self) -> None:
        """End its connections."""
        ...


def own_headers(config: UpstreamConfig) -> list[tuple[bytes, bytes]]:
    """The headers of the gateway's own calls."""
    key = os.environ.get(config.key, "") if config.key else ""
    authorization = [(b"authorization", f"Bearer {key}".encode())] if key else []
    return [(b"content-type", b"application/json"), *authorization]


def forwarded(headers: Headers, dropped: Set[bytes] = frozenset()) -> list[tuple[bytes, bytes]]:
    """The headers that are not of one connection, without those in ``dropped``."""
    named = {
        word.strip().lower() for name, value in headers if name.lower() == b"connection" for word in value.split(b",")
    }
    gone = HOP_BY_HOP | named | dropped
    return [item for item in headers if item[0].lower() not in gone]


class HttpUpstream:
    """A server at an address. ``connections`` is how many it gets at most; 0 for any number."""

    def __init__(self, name: str, config: UpstreamConfig, *, connections: int = 0) -> None:
        self.name, self.config, self._connections = name, config, connections
        self._session: ClientSession | None = None
        self._away_until = 0.0

    @property
    def away(self) -> bool:
        """Whether it was gone a moment ago."""
        return time.monotonic() < self._away_until

    async def send(self, method: str, target: str, headers: Headers, body: bytes | None) -> UpstreamAnswer:
        """The answer; where a kept connection turns out to be closed, the request is sent again."""
        import aiohttp

        try:
            try:
                response = await self._request(method, target, headers, body)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if isinstance(error, aiohttp.ClientConnectorError):
                    raise
                response = await self._request(method, target, headers, body)
        except TimeoutError:
            raise UpstreamError(TIMEOUT, f"{self.name}: no response for {self.config.timeout:g} s") from None
        except ValueError as error:  # of this request, which no server can get so; the others are asked as before
            raise UpstreamError(REFUSED, f"{self.name}: cannot be sent ({_reason(error)})") from None
        except (aiohttp.ClientError, OSError) as error:
            self._away_until = time.monotonic() + AWAY
            raise UpstreamError("upstream_gone", f"{self.name}: no answer ({_reason(error)})") from None
        self._away_until = 0.0
        return UpstreamAnswer(response.status, response.raw_headers, self._chunks(response), response.close)

    async def close(self) -> None:
        """End its connections."""
        if self._session:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, target: str, headers: Headers, body: bytes | None) -> ClientResponse:
        from yarl import URL

        url = URL(self.config.url.rstrip("/") + target, encoded=True)
        if url.user is not None and header(headers, b"authorization"):
            url = url.with_user(None)  # the client's own key goes before the address's
        decoded = [(name.decode("latin-1"), _decoded(value)) for name, value in headers]
        return await self._open().request(method, url, headers=decoded, data=body, allow_redirects=False)

    def _open(self) -> ClientSession:
        import aiohttp

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=self.config.timeout)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEP),
                timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                read_bufsize=1 << 18, max_line_size=1 << 16, max_field_size=1 << 16,
            )  # fmt: skip
        return self._session

    async def _chunks(self, response: ClientResponse) -> AsyncIterator[bytes]:
        import aiohttp

        try:
            async for chunk in response.content.iter_any():
                yield chunk
        except TimeoutError:
            raise UpstreamError(TIMEOUT, f"{self.name}: silent for {self.config.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(CUT_OFF, f"{self.name}: connection lost ({_reason(error)})") from None
        finally:
            response.close()  # nothing, where all of it was read


class AppUpstream:
    """An ASGI application in this process: vLLM itself, where the gateway is its middleware."""

    away = False

    def __init__(self, name: str, config: UpstreamConfig, app: AsgiApp) -> None:
        self.name, self.config, self._app = name, config, app

    async def send(self, method: str, target: str, headers: Headers, body: bytes | None) -> UpstreamAnswer:
        """The answer of the application; what it raises is an UpstreamError."""
        path, _, query = target.partition("?")
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(name.lower(), value) for name, value in headers], "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
        }  # fmt: skip
        return await _InProcess(self.name, self._app, scope, body or b"").answer()

    async def close(self) -> None:
        """Nothing: the application is not ours."""


class _InProcess:
    """One request to an application, which runs as a task of its own."""

    def __init__(self, name: str, app: AsgiApp, scope: Scope, body: bytes) -> None:
        self.name, self._left = name, asyncio.Event()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=16)
        self._unread = [body]
        self._task = asyncio.ensure_future(self._run(app, scope))

    async def answer(self) -> UpstreamAnswer:
        """Once it begins."""
        start = await self._messages.get()
        if start is None:
            raise UpstreamError("upstream_gone", f"{self.name}: no answer ({_outcome(self._task)})")
        status, headers = start["status"], start.get("headers", ())
        assert isinstance(status, int) and isinstance(headers, Sequence)
        return UpstreamAnswer(
            status, [(bytes(name), bytes(value)) for name, value in headers], self._chunks(), self._end
        )

    async def _run(self, app: AsgiApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            if not self._left.is_set():
                await self._messages.put(None)

    async def _send(self, message: Message) -> None:
        if not self._left.is_set():
            await self._messages.put(message)

    async def _receive(self) -> Message:
        if self._unread:
            return {"type": "http.request", "body": self._unread.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while (message := await self._messages.get()) is not None:
                body = message.get("body", b"")
                if body:
                    assert isinstance(body, bytes)
                    yield body
                if not message.get("more_body"):
                    return
            raise UpstreamError(CUT_OFF, f"{self.name}: the answer ended early ({_outcome(self._task)})")
        finally:
            self._end()

    def _end(self) -> None:
        self._left.set()
        with suppress(asyncio.QueueEmpty):
            while True:  # it may wait for room
                self._messages.get_nowait()
        self._task.add_done_callback(_outcome)


def _outcome(task: asyncio.Future[None]) -> str:
    """What a task raised, which nobody else asks for."""
    if not task.done() or task.cancelled():
        return "it ended without one"
    error = task.exception()
    return _reason(error) if error else "it ended without one"


def _decoded(value: bytes) -> str:
    """A header's value as text, which is sent in UTF-8: as it came, if it was that."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split())[:200]


def target_of(scope: Scope) -> str:
    """Path and query of a request, as they came."""
    raw, query = scope.get("raw_path"), scope.get("query_string")
    path = raw.decode("latin-1") if isinstance(raw, bytes) and raw else quote(str(scope["path"]))
    return f"{path}?{query.decode('latin-1')}" if isinstance(query, bytes) and query else path


def header(headers: Headers, name: bytes) -> bytes:
    """The value of a header; empty where it is not there."""
    return next((value for key, value in headers if key.lower() == name), b"")
