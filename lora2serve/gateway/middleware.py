"""The gateway around an ASGI application; vLLM: ``--middleware lora2serve.gateway.middleware.GatewayMiddleware``."""

from __future__ import annotations

import os
from pathlib import Path

from lora2serve.api.version_registry import Registry
from lora2serve.console import Terminal
from lora2serve.gateway.gateway_app import Gateway
from lora2serve.gateway.gateway_config import UpstreamConfig, load
from lora2serve.gateway.gateway_metrics import GatewayMetrics
from lora2serve.gateway.upstreams import AppUpstream, AsgiApp, HttpUpstream, Message, Receive, Scope, Send, Upstream

VARIABLE = "LORA2SERVE_GATEWAY"  # gateway.yaml, for a gateway inside a server
INSIDE = "vllm"  # the name of that server among the upstreams
SHARED = ("app", "state")  # what Starlette's applications look for beside a request: themselves, and what they set up


class GatewayMiddleware:
    """Starts and ends the gateway with the application, and lets it answer. Without one: as LORA2SERVE_GATEWAY says."""

    def __init__(self, app: AsgiApp, gateway: Gateway | None = None) -> None:
        self._app, self._shared = app, dict[str, object]()
        self._gateway = gateway or inside(self._asked)

    async def _asked(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, for requests that are the gateway's own."""
        own = {key: dict(value) if isinstance(value, dict) else value for key, value in self._shared.items()}
        await self._app({**own, **scope}, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """HTTP goes to the gateway, everything else to the application."""
        if not self._shared:
            self._shared |= {key: scope[key] for key in SHARED if key in scope}
        if scope["type"] == "http":
            await self._gateway(scope, receive, send)
            return

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._gateway.start()
            elif message["type"] == "lifespan.shutdown":
                await self._gateway.close()
            return message

        await self._app(scope, watched, send)


def inside(app: AsgiApp) -> Gateway:
    """A gateway in the process of a server; other servers may stand in its configuration."""
    path = os.environ.get(VARIABLE, "")
    config = load(Path(path) if path else None, [], inside=INSIDE)
    own = config.upstreams.get(INSIDE, UpstreamConfig())
    others = {name: upstream for name, upstream in config.upstreams.items() if name != INSIDE}
    upstreams: dict[str, Upstream] = {INSIDE: AppUpstream(INSIDE, own, app)}
    shadows: dict[str, Upstream] = dict(upstreams)
    upstreams |= {name: HttpUpstream(name, other) for name, other in others.items()}
    shadows |= {name: HttpUpstream(name, other) for name, other in others.items()}
    return Gateway(config, Registry(), upstreams, shadows, app, GatewayMetrics(), Terminal())
