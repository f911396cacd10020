"""The gateway as an ASGI middleware: names of the registry go to their versions, everything else passes as it is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus

from lora2serve.errors import Lora2ServeError
from lora2serve.gateway.adapter_cache import AdapterCache, VersionPlacement
from lora2serve.gateway.client_side import BodyRefused, ClientLeft, ClientWatch, send_error
from lora2serve.gateway.content_coding import decoded
from lora2serve.gateway.exchange import Exchange, Recorder, error_of
from lora2serve.gateway.gateway_config import GatewayConfig
from lora2serve.gateway.gateway_metrics import GatewayMetrics
from lora2serve.gateway.model_names import (
    DEEPEST,
    EVENT_ENDS,
    LINE_ENDS,
    AnswerNames,
    counting_tokens,
    is_too_deep,
    parse_object,
    with_model,
)  # fmt: skip
from lora2serve.gateway.record_writer import RecordWriter
from lora2serve.gateway.request_record import CUT_OFF, TIMEOUT, RequestRecord, unit_hash
from lora2serve.gateway.routing import RouteChoice, Routes
from lora2serve.gateway.security import request_id
from lora2serve.gateway.shadow import ShadowCopy, ShadowQueue
from lora2serve.gateway.upstreams import (
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    UpstreamError,
    forwarded,
    header,
    target_of,
)  # fmt: skip
from lora2serve.system.json_values import Json, objects

UNIT_KEYS = ("safety_identifier", "user", "prompt_cache_key")  # of a body: whom it is from
LINES = (b"application/x-ndjson", b"application/jsonl")
UNKNOWN_MODEL = b"does not exist"  # what vLLM says of an adapter that it does not have, with 404


@dataclass(frozen=True)
class RoutedRequest:
    """A request for a name of the registry, read to its end."""

    request_id: str
    path: str
    target: str  # path and query
    headers: Headers  # for the server, without those of the connection
    body: bytes
    content: Json
    model: str  # as the client calls it
    unit: str

    @property
    def stream(self) -> bool:
        """Whether the answer comes in parts."""
        return self.content.get("stream") is True or ("stream" not in self.content and self.path.startswith("/api/"))


@dataclass(frozen=True)
class RoutedProxy:
    """Sends routed requests to versions, and their answers back."""

    config: GatewayConfig
    routes: Routes
    cache: AdapterCache
    recorder: Recorder
    writer: RecordWriter
    shadows: ShadowQueue
    metrics: GatewayMetrics
    secret: bytes

    def read(self, scope: Scope, headers: Headers, body: bytes) -> RoutedRequest | None:
        """The request, if it names a model of a route; BodyRefused where it is nested too deep."""
        content = parse_object(body)
        model = content.get("model") if content else None
        if not content or not isinstance(model, str) or model not in self.routes:
            return None
        if is_too_deep(body, content):
            raise BodyRefused(HTTPStatus.BAD_REQUEST, f"body: nested over {DEEPEST} levels")
        identity = request_id(headers)
        kept = forwarded(headers, {b"host", b"content-length", b"accept-encoding", b"x-request-id", b"expect"})
        return RoutedRequest(
            identity, str(scope["path"]), target_of(scope),
            [*kept, (b"x-request-id", identity.encode()), (b"accept-encoding", b"identity")], body, content, model,
            self._unit(model.partition("@")[0], headers, content) or identity,
        )  # fmt: skip

    def _unit(self, name: str, headers: Headers, content: Json) -> str:
        """Whom a request is from: a header or a key says it, else how the conversation begins."""
        sent = header(headers, self.config.route(name).unit_header.lower().encode()).decode("latin-1")
        keys = [value for key in UNIT_KEYS if isinstance(value := content.get(key), str) and value]
        if sent or keys:
            return sent or keys[0]
        messages = objects(content.get("messages"))
        first = next((number for number, message in enumerate(messages) if message.get("role") == "user"), 0)
        beginning = messages[: first + 1] or content.get("prompt") or content.get("input")
        return json.dumps(beginning, sort_keys=True) if beginning else ""

    async def answer(self, request: RoutedRequest, receive: Receive, send: Send) -> None:
        """Let a version answer; the champion where that of the challenger is gone."""
        choice = self.routes.choose(request.model, request.unit)
        unit = unit_hash(self.secret, choice.name, request.unit)
        attempts = [choice]
        if choice.version != choice.champion:
            attempts.append(RouteChoice(choice.name, choice.champion, "champion", choice.champion))
        for attempt in attempts:
            exchange = Exchange(
                request_id=request.request_id, name=attempt.name, version=attempt.version, arm=attempt.arm, unit=unit,
                path=request.path, content=request.content, stream=request.stream,
            )  # fmt: skip
            client = _Client(request, exchange, receive, send)
            self.metrics.begun(attempt.name, attempt.version, attempt.arm)
            try:
                async with client.watch:
                    await self._attempt(request, exchange, client)
            except ClientLeft:
                exchange.error = "client_left"
                return
            except Lora2ServeError as error:
                exchange.error = error.kind if isinstance(error, UpstreamError) else "upstream_gone"
                if not client.started and attempt is not attempts[-1]:
                    continue
                await client.fail(error)
            except BaseException:  # the gateway ends, or is at fault
                exchange.error = CUT_OFF
                raise
            finally:
                record = self._over(exchange)
            self._copy(request, choice, record)
            return

    async def _attempt(self, request: RoutedRequest, exchange: Exchange, client: _Client) -> None:
        """One version: a server that is gone is passed over, and an adapter that one has lost is loaded again."""
        key, reload, tried = (exchange.name, exchange.version), True, set[str]()
        while True:
            placements = [each for each in await self.cache.ensure(key) if each.upstream.name not in tried]
            if not placements:
                raise UpstreamError("upstream_gone", f"{exchange.name}@{exchange.version}: no server is left")
            placement = placements[0]
            exchange.upstream = placement.upstream.name
            self.cache.hold(key, exchange.upstream)
            try:
                if await self._through(request, exchange, client, placement, reload=reload):
                    return
                self.cache.forget(key, exchange.upstream)
                reload = False
            except UpstreamError as error:
                if client.started or error.kind != "upstream_gone" or len(placements) < 2:
                    raise
                tried.add(exchange.upstream)
            finally:
                self.cache.release(key, exchange.upstream)

    async def _through(
        self, request: RoutedRequest, exchange: Exchange, client: _Client, placement: VersionPlacement, *, reload: bool
    ) -> bool:
        """Send it there, and the answer to the client; False where the server has lost the adapter."""
        body = with_model(request.body, request.content, placement.model)
        body, counted = counting_tokens(body, request.content, request.path)
        answer = decoded(
            await placement.upstream.send("POST", request.target, request.headers, body), placement.upstream.name
        )
        try:
            exchange.status = answer.status
            exchange.error = error_of(answer.status)
            names = AnswerNames(placement.model, request.model, usage=counted)
            kind = header(answer.headers, b"content-type").partition(b";")[0].strip().lower()
            if kind == b"text/event-stream" or kind in LINES:
                await client.stream(answer.status, answer.headers, names, answer.chunks, lines=kind in LINES)
                return True
            whole = await answer.body()
            if reload and placement.loaded and answer.status == HTTPStatus.NOT_FOUND and UNKNOWN_MODEL in whole:
                return False
            exchange.received(whole)
            await client.whole(answer.status, answer.headers, names.whole(whole))
            return True
        finally:
            answer.close()

    def _over(self, exchange: Exchange) -> RequestRecord:
        record = self.recorder.record(exchange)
        self.metrics.finished(record)
        self.writer.put(record)
        return record

    def copied(self, exchange: Exchange) -> None:
        """A shadow's copy is over."""
        self.metrics.begun(exchange.name, exchange.version, exchange.arm)
        self._over(exchange)

    def _copy(self, request: RoutedRequest, choice: RouteChoice, answered: RequestRecord) -> None:
        """What the shadow gets: a request that the champion has answered."""
        if choice.shadow is None or answered.error:
            return
        content = {key: value for key, value in request.content.items() if key != "stream_options"}
        content |= {"stream": False} if request.stream else {}  # nobody reads along
        copy = Exchange(
            request_id=request.request_id, name=choice.name, version=choice.shadow, arm="shadow", unit=answered.unit,
            path=request.path, content=content, stream=False,
        )  # fmt: skip
        headers = [item for item in request.headers if item[0] != b"x-request-id"]
        named = [*headers, (b"x-request-id", f"{request.request_id}-shadow".encode())]
        config = self.config.route(choice.name).shadow
        self.shadows.put(ShadowCopy(copy, request.target, named, config, len(request.body) + 1000))


class _Client:
    """The client's end of an exchange."""

    def __init__(self, request: RoutedRequest, exchange: Exchange, receive: Receive, send: Send) -> None:
        self._request, self._exchange, self._send = request, exchange, send
        self.watch = ClientWatch(receive)
        self.started = False

    async def stream(
        self, status: int, headers: Headers, names: AnswerNames, chunks: AsyncIterator[bytes], *, lines: bool
    ) -> None:
        """Events as they come."""
        await self._start(status, headers, None)
        self._exchange.streamed = True
        ends = LINE_ENDS if lines else EVENT_ENDS
        async for chunk in chunks:
            self._exchange.received(chunk)
            if complete := names.events(chunk, ends):
                await self._send({"type": "http.response.body", "body": complete, "more_body": True})
        await self._end(names.last())

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete answer."""
        await self._start(status, headers, len(body))
        await self._end(body)

    async def fail(self, error: Lora2ServeError) -> None:
        """Say why there is no answer; one that has begun is cut off, so that nobody takes it for a whole one."""
        if self.started:
            raise error
        status = HTTPStatus.GATEWAY_TIMEOUT if self._exchange.error == TIMEOUT else HTTPStatus.BAD_GATEWAY
        self._exchange.status = 0
        await send_error(self._send, status, error.message, own=self._own_headers())

    async def _end(self, body: bytes) -> None:
        self.watch.ended = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: Headers, length: int | None) -> None:
        kept = forwarded(headers, {b"content-length", b"x-request-id", b"date", b"server"})
        if length is not None:
            kept.append((b"content-length", str(length).encode()))
        self.started = True
        start: Message = {"type": "http.response.start", "status": status, "headers": [*kept, *self._own_headers()]}
        await self._send(start)

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        version = f"{self._exchange.name}@{self._exchange.version}"
        return [
            (b"x-request-id", self._request.request_id.encode()), (b"x-lora2serve-version", version.encode()),
            (b"x-lora2serve-arm", self._exchange.arm.encode()),
        ]  # fmt: skip
