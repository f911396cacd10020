"""The whole gateway as an ASGI application: what it does itself, what it routes, what it passes on, what it refuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

from lora2serve.api.version_registry import Registry
from lora2serve.errors import EngineError
from lora2serve.gateway.adapter_cache import AdapterCache
from lora2serve.gateway.client_side import (
    BodyRefused,
    ClientLeft,
    read_body,
    replayed,
    send_error,
    send_json,
    too_large,
)  # fmt: skip
from lora2serve.gateway.drift.text_features import describe
from lora2serve.gateway.exchange import Exchange, Recorder
from lora2serve.gateway.feedback_requests import take_feedback
from lora2serve.gateway.gateway_config import GatewayConfig
from lora2serve.gateway.gateway_metrics import GatewayMetrics
from lora2serve.gateway.model_names import parse_object
from lora2serve.gateway.monitoring.otel_metrics import otel_observer
from lora2serve.gateway.proxy import RoutedProxy
from lora2serve.gateway.record_writer import RecordWriter
from lora2serve.gateway.request_record import TrafficObserver
from lora2serve.gateway.routing import Routes
from lora2serve.gateway.security import header_bytes, is_authorized, is_closed, read_secret
from lora2serve.gateway.shadow import ShadowQueue
from lora2serve.gateway.traffic_store import TrafficStore
from lora2serve.gateway.trial_loop import TrialLoop, TrialMetrics
from lora2serve.gateway.upstreams import (
    AppUpstream,
    AsgiApp,
    Headers,
    Receive,
    Scope,
    Send,
    Upstream,
    UpstreamError,
    forwarded,
    header,
)  # fmt: skip
from lora2serve.progress import Progress
from lora2serve.system.json_values import Json, at, objects

MODELS, FEEDBACK = "/v1/models", "/v1/feedback"
HEALTH, METRICS = "/gateway/health", "/metrics"  # also where there are too many requests: it is busy, and not ill


class Gateway:
    """Routes, and everything that works behind them. ``inner`` gets what no route is for.

    upstreams: the first is the one that lists the models which are none of the registry. shadows: the same servers, by
        connections of their own.
    """

    def __init__(
        self, config: GatewayConfig, registry: Registry, upstreams: Mapping[str, Upstream],
        shadows: Mapping[str, Upstream], inner: AsgiApp, metrics: GatewayMetrics, progress: Progress,
        observers: Sequence[TrafficObserver] = (),
    ) -> None:  # fmt: skip
        folder = Path(config.capture.folder)
        self.config, self.metrics = config, metrics
        self._inner, self._upstreams, self._all = inner, upstreams, [*upstreams.values(), *shadows.values()]
        secret = read_secret(folder, progress)
        store = TrafficStore(folder, most_bytes=config.capture.most_bytes)
        self._otel = otel_observer(progress)
        heard = [metrics, *observers, *([self._otel] if self._otel else [])]
        self._writer = RecordWriter(store, heard, metrics.records_dropped, progress)
        cache = AdapterCache(upstreams, lambda name, number: adapter_directory(registry, name, number), metrics)
        self._shadows = ShadowQueue(shadows, cache, self._copied, metrics.shadow_dropped)
        self.cache, self.routes = cache, Routes(config, cache, registry.live, secret, metrics, progress)
        recorder = Recorder(config.capture, describe)
        self._proxy = RoutedProxy(config, self.routes, cache, recorder, self._writer, self._shadows, metrics, secret)
        self._trials = TrialLoop(config, registry, self.routes, TrialMetrics(metrics.registry), progress)
        self._tasks: list[asyncio.Task[None]] = []
        self._requests = 0

    async def start(self) -> None:
        """Begin its background work; the routes are those of the registry from then on."""
        self._writer.start()
        await self.routes.look()
        self._tasks = [asyncio.ensure_future(self.routes.run()), asyncio.ensure_future(self._trials.run())]

    async def close(self) -> None:
        """End it: what was recorded is stored, copies that wait are dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.routes.close()
        await self._shadows.close()
        await asyncio.to_thread(self._writer.close)
        if self._otel:
            await asyncio.to_thread(self._otel.close)
        await self._trials.close()
        for upstream in self._all:
            await upstream.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if self._requests >= self.config.limits.requests and scope["path"] not in (HEALTH, METRICS):
            await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once: try again")
            return
        self._requests += 1
        try:
            await self._request(scope, receive, send)
        except ClientLeft:
            pass
        except BodyRefused as refused:
            await send_error(send, refused.status, refused.message)
        finally:
            self._requests -= 1

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path, headers = str(scope["method"]), str(scope["path"]), scope["headers"]
        assert isinstance(headers, Sequence)
        if not path.startswith("/"):  # `OPTIONS *`; and behind a server's address it would name another one
            await send_error(send, HTTPStatus.BAD_REQUEST, f"{path[:60]}: expected a path")
            return
        if header_bytes(headers) > self.config.limits.header_bytes:
            limit = self.config.limits.header_bytes
            await send_error(send, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"headers: over {limit} bytes")
            return
        length = header(headers, b"content-length")
        if length.isdigit() and int(length) > self.config.limits.body_bytes:
            raise too_large(self.config.limits.body_bytes)
        if await self._own(method, path, headers, receive, send):
            return
        if is_closed(path):
            await send_error(send, HTTPStatus.FORBIDDEN, f"{path}: not for clients of a gateway")
            return
        body = await read_body(receive, self.config.limits.body_bytes)
        if method == "POST" and b"multipart" not in header(headers, b"content-type"):
            request = self._proxy.read(scope, headers, body)
            if request is not None:
                await self._proxy.answer(request, receive, send)
                return
        await self._inner(scope, replayed(body, receive), send)

    async def _own(self, method: str, path: str, headers: Headers, receive: Receive, send: Send) -> bool:
        """Answer what is the gateway's own; whether it was."""
        if (method, path) == ("GET", METRICS):
            text = self.metrics.text() + await self._inside_metrics()
            head = [
                (b"content-type", b"text/plain; version=1.0.0; charset=utf-8"),
                (b"content-length", b"%d" % len(text)),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": text, "more_body": False})
        elif (method, path) == ("GET", HEALTH):
            await send_json(send, HTTPStatus.OK, {"status": "ok"})
        elif (method, path) == ("POST", FEEDBACK):
            if await _let_in(headers, self.config.feedback_key, send):
                await take_feedback(await read_body(receive, self.config.limits.body_bytes), self._writer, send)
        elif (method, path) == ("GET", "/gateway/routes"):
            if await _let_in(headers, self.config.admin_key, send):
                await send_json(send, HTTPStatus.OK, self._state())
        elif method == "GET" and path == MODELS and self._upstreams:
            await self._models(headers, send)
        elif method == "GET" and path.removeprefix(f"{MODELS}/") in self.routes and path.startswith(f"{MODELS}/"):
            await send_json(send, HTTPStatus.OK, _entry(path.removeprefix(f"{MODELS}/")))
        else:
            return False
        return True

    async def _inside_metrics(self) -> bytes:
        """Those of the server whose process this is: they have no other address."""
        inside = next((each for each in self._upstreams.values() if isinstance(each, AppUpstream)), None)
        if inside is None:
            return b""
        try:
            answer = await inside.send("GET", "/metrics", [], None)
            return await answer.body() if answer.status == HTTPStatus.OK else b""
        except UpstreamError:
            return b""

    async def _models(self, headers: Headers, send: Send) -> None:
        """The aliases, behind the models of the first server that are none of the registry."""
        entries: list[Json] = []
        upstream = next(iter(self._upstreams.values()))
        try:
            answer = await upstream.send("GET", MODELS, forwarded(headers, {b"host", b"accept-encoding"}), None)
            body = await answer.body()
            if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                await send_error(send, answer.status, "the server wants its key")
                return
            entries = objects(at(parse_object(body), "data"))
        except UpstreamError:
            pass  # the aliases are known without it
        versions = {f"{name}-" for name in self.routes.table()}
        own = [entry for entry in entries if not _is_version(str(entry.get("id")), versions)]
        await send_json(send, HTTPStatus.OK, {"object": "list", "data": [*own, *map(_entry, self.routes.models())]})

    def _state(self) -> dict[str, object]:
        loaded = {name: [f"{key[0]}@{key[1]}" for key in keys] for name, keys in self.cache.loaded().items()}
        return {"routes": self.routes.table(), "loaded": loaded, "requests": self._requests}

    def _copied(self, exchange: Exchange) -> None:
        self._proxy.copied(exchange)


def adapter_directory(registry: Registry, name: str, number: int) -> Path:
    """The adapter export of a version; EngineError where it has none."""
    version = registry.get(f"{name}@{number}")
    label = next((export.name for export in version.exports if export.target == "adapter"), None)
    if label is None:
        raise EngineError(
            f"{version.reference}: has no adapter export",
            f"`lora2serve export {version.reference} --target adapter`, and `lora2serve registry add` what it prints",
        )
    return registry.path(f"{version.reference}/{label}")


def _entry(model: str) -> Json:
    return {"id": model, "object": "model", "created": int(time.time()), "owned_by": "lora2serve"}


def _is_version(model: str, beginnings: set[str]) -> bool:
    name, dash, number = model.rpartition("-")
    return number.isdecimal() and f"{name}{dash}" in beginnings


async def _let_in(headers: Headers, variable: str, send: Send) -> bool:
    """Whether a request has the key that this needs; else it is told."""
    allowed = is_authorized(headers, variable)
    if allowed is None:
        await send_error(send, HTTPStatus.FORBIDDEN, f"closed: {variable} is not set where the gateway runs")
    elif not allowed:
        await send_error(send, HTTPStatus.UNAUTHORIZED, "wrong or no key: Authorization: Bearer KEY")
    return bool(allowed)
