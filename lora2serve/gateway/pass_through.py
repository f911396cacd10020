"""A server as an ASGI application: every request that is for no version goes there, and its answer back, as bytes."""

from __future__ import annotations

from http import HTTPStatus
from time import perf_counter

from lora2serve.gateway.client_side import ClientLeft, ClientWatch, read_body, send_error
from lora2serve.gateway.gateway_metrics import GatewayMetrics
from lora2serve.gateway.request_record import TIMEOUT
from lora2serve.gateway.upstreams import Receive, Scope, Send, Upstream, UpstreamError, forwarded, target_of

OWN = {b"host", b"content-length", b"expect"}  # headers that the connection to the server has of its own


class PassThrough:
    """What no route is for, at one server. Bodies are read before, and are not too large."""

    def __init__(self, upstream: Upstream, metrics: GatewayMetrics) -> None:
        self._upstream, self._metrics = upstream, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it on; of what is not HTTP there is nothing to do but to say so."""
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": f"{message['type']}.complete"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "the gateway speaks HTTP only"})
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, headers = perf_counter(), 0, scope["headers"]
        assert isinstance(headers, list)
        body = await read_body(receive, 1 << 62)
        kept = forwarded(headers, OWN)
        watch, started = ClientWatch(receive), False
        try:
            async with watch:
                answer = await self._upstream.send(str(scope["method"]), target_of(scope), kept, body or None)
                try:
                    status, started = answer.status, True
                    head = forwarded(answer.headers, {b"date", b"server"})
                    await send({"type": "http.response.start", "status": status, "headers": head})
                    async for chunk in answer.chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    watch.ended = True
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                finally:
                    answer.close()
        except ClientLeft:
            pass
        except UpstreamError as error:
            if started:
                raise  # cut off: nobody takes it for a whole answer
            gone = HTTPStatus.GATEWAY_TIMEOUT if error.kind == TIMEOUT else HTTPStatus.BAD_GATEWAY
            await send_error(send, gone, error.message)
        finally:
            self._metrics.other(self._upstream.name, status, perf_counter() - start)
