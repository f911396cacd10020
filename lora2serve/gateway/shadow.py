"""Copies of requests to a version whose answers nobody sees: after the client has its answer, or not at all."""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from lora2serve.errors import Lora2ServeError
from lora2serve.gateway.adapter_cache import AdapterCache
from lora2serve.gateway.content_coding import decoded
from lora2serve.gateway.exchange import Exchange, error_of
from lora2serve.gateway.gateway_config import ShadowConfig
from lora2serve.gateway.request_record import TIMEOUT
from lora2serve.gateway.upstreams import Headers, Upstream, UpstreamError, own_headers

MOST_BYTES = 64 << 20  # of the copies that wait
LOOK = 1.0  # seconds for which it is known whether a server has requests that wait
WAITING = re.compile(rb"^vllm:num_requests_waiting(?:\{[^}]*\})? ([0-9.e+]+)", re.MULTILINE)


@dataclass(frozen=True)
class ShadowCopy:
    """A request that was answered, for another version."""

    exchange: Exchange  # of the copy; it begins when it is sent
    target: str  # path and query
    headers: Headers
    config: ShadowConfig
    size: int  # bytes, about


class ShadowQueue:
    """Copies that wait, and those under way. ``dropped`` hears why one was not sent; ``done`` gets what came of it.

    upstreams: with connections of their own, so that a server that hangs holds none of the clients'.
    """

    def __init__(
        self, upstreams: Mapping[str, Upstream], cache: AdapterCache, done: Callable[[Exchange], None],
        dropped: Callable[[str, str], object],
    ) -> None:  # fmt: skip
        self._upstreams, self._cache, self._done, self._dropped = upstreams, cache, done, dropped
        self._waiting: deque[ShadowCopy] = deque()
        self._size = 0
        self._running: set[asyncio.Task[None]] = set()
        self._looked: dict[str, tuple[float, bool]] = {}

    def put(self, copy: ShadowCopy) -> None:
        """Send a copy when there is room for it; dropped where too many wait."""
        if len(self._waiting) >= copy.config.queue or self._size + copy.size > MOST_BYTES:
            self._dropped(copy.exchange.name, "queue")
            return
        self._waiting.append(copy)
        self._size += copy.size
        self._start()

    async def close(self) -> None:
        """Drop what waits, and end what is under way."""
        for copy in self._waiting:
            self._dropped(copy.exchange.name, "end")
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._waiting[0].config.parallel:
            copy = self._waiting.popleft()
            self._size -= copy.size
            task = asyncio.ensure_future(self._run(copy))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whatever it is, it is nobody's but the copy's
            self._start()

    async def _run(self, copy: ShadowCopy) -> None:
        exchange = copy.exchange
        try:
            placement = (await self._cache.ensure((exchange.name, exchange.version)))[0]
        except Lora2ServeError:
            self._dropped(exchange.name, "unavailable")
            return
        exchange.upstream = placement.upstream.name
        if await self._busy(exchange.upstream):
            self._dropped(exchange.name, "busy")
            return
        try:
            async with asyncio.timeout(copy.config.timeout):
                await self._send(copy, placement.model)
        except TimeoutError:
            exchange.error = TIMEOUT
        except UpstreamError as error:
            exchange.error = error.kind
        self._done(exchange)

    async def _send(self, copy: ShadowCopy, model: str) -> None:
        exchange, key = copy.exchange, (copy.exchange.name, copy.exchange.version)
        body = json.dumps({**exchange.content, "model": model}).encode()
        self._cache.hold(key, exchange.upstream)
        exchange.begin()
        try:
            upstream = self._upstreams[exchange.upstream]
            answer = decoded(await upstream.send("POST", copy.target, copy.headers, body), upstream.name)
            exchange.status = answer.status
            try:
                async for chunk in answer.chunks:
                    exchange.received(chunk)
            finally:
                answer.close()
        finally:
            self._cache.release(key, exchange.upstream)
        exchange.error = error_of(exchange.status)

    async def _busy(self, name: str) -> bool:
        """Whether requests wait at a vLLM: a copy would make them wait longer."""
        now = asyncio.get_running_loop().time()
        at, busy = self._looked.get(name, (-LOOK, False))
        if now - at < LOOK:
            return busy
        self._looked[name] = (now, False)  # others do not ask in the meantime
        upstream = self._upstreams[name]
        with suppress(UpstreamError):
            answer = await upstream.send("GET", "/metrics", own_headers(upstream.config), None)
            busy = any(float(value) > 0 for value in WAITING.findall(await answer.body()))
            self._looked[name] = (now, busy)
            return busy
        return False
