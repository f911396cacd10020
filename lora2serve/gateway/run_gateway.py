"""``lora2serve.start_gateway``, and what the command does: a gateway on a port, until it is ended."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lora2serve.api.version_registry import Registry
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import EngineError, did_you_mean
from lora2serve.gateway.gateway_app import Gateway
from lora2serve.gateway.gateway_config import GatewayConfig, load
from lora2serve.gateway.gateway_metrics import GatewayMetrics
from lora2serve.gateway.http_protocol import bounded_protocol, quiet_log
from lora2serve.gateway.middleware import GatewayMiddleware
from lora2serve.gateway.pass_through import PassThrough
from lora2serve.gateway.request_record import TrafficObserver
from lora2serve.gateway.upstreams import HttpUpstream, Upstream
from lora2serve.progress import Progress
from lora2serve.system import interruption
from lora2serve.system.http import without_credentials

if TYPE_CHECKING:
    import uvicorn

HOST, PORT = "127.0.0.1", 9000
FILE = Path("gateway.yaml")
BACKLOG = 2048
DRAIN = 600  # seconds that streams under way get when the gateway is ended
SHADOW_CONNECTIONS = 100
SWITCH = 0.0005  # seconds until the thread that stores records lets the one that answers go on


@dataclass(frozen=True)
class RunningGateway:
    """A gateway that answers at ``address``. Use it in a ``with`` statement, or ``close`` it."""

    address: str
    server: uvicorn.Server
    thread: threading.Thread

    def close(self) -> None:
        """End it, once the answers under way are complete."""
        self.server.should_exit = True
        self.thread.join()

    def __enter__(self) -> RunningGateway:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@checked
def start_gateway(
    config: str | Path | None = None, *, upstreams: Sequence[str] = (), registry: Registry | str | Path | None = None,
    host: str = HOST, port: int = PORT, observers: Sequence[TrafficObserver] = (), progress: Progress | None = None,
) -> RunningGateway:  # fmt: skip
    """Start a gateway in front of servers, in a thread, and return once it answers.

    config: gateway.yaml.
    upstreams: servers as ``NAME=URL``, over those of the file; the first gets what is for no version of the registry.
    registry: whose aliases are routes; by default what LORA2SERVE_REGISTRY names, else ``registry``.
    host, port: where clients connect; 0 for any free port.
    observers: hear of every record and of feedback, once they are stored.
    progress: where messages go. By default they are shown at a prompt or in a notebook only.

    Raises UsageError for a configuration or registry that cannot be, EngineError for a port that is taken.
    """
    opened = registry if isinstance(registry, Registry) else Registry(registry)
    settings = load(Path(config) if config else None, upstreams)
    listener = _listener(host, port)
    server = _server(settings, opened, progress or default_progress(), observers)
    thread = threading.Thread(target=server.run, args=([listener],), name="gateway", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise EngineError("the gateway ended when it started", "`lora2serve -v gateway` shows why")
        time.sleep(0.01)
    return RunningGateway(_address(host, listener), server, thread)


def run_gateway(
    config: Path | None, upstreams: Sequence[str], registry: str | None, host: str, port: int, progress: Progress
) -> None:
    """What the command does: answer until a signal comes, and then complete what is under way."""
    chosen = config or (FILE if FILE.is_file() else None)
    settings, opened = load(chosen, upstreams), Registry(registry)
    names = opened.names()  # refuses a registry that is not there
    for name in settings.routes.keys() - set(names):
        progress.warn(f"routes.{name}: no such name in the registry{did_you_mean(name, names)}; it does nothing yet")
    with _listener(host, port) as listener:
        server = _server(settings, opened, progress)
        progress.note(f"{_address(host, listener)} answers for {', '.join(names) or 'no name yet'}")
        for name, upstream in settings.upstreams.items():
            progress.note(f"{name}: {without_credentials(upstream.url)}")
        interruption.handle(server.handle_exit)  # uvicorn raises a signal once more when it has ended in order
        sys.setswitchinterval(SWITCH)
        server.run([listener])
        progress.note("ended")


def _server(
    config: GatewayConfig, registry: Registry, progress: Progress, observers: Sequence[TrafficObserver] = ()
) -> uvicorn.Server:
    """The gateway and its HTTP server, not yet started."""
    import aiohttp  # noqa: F401  # where it is missing, that is said now and not with the first request
    import uvicorn

    def servers(connections: int) -> dict[str, Upstream]:
        items = config.upstreams.items()
        return {name: HttpUpstream(name, upstream, connections=connections) for name, upstream in items}

    upstreams, metrics = servers(0), GatewayMetrics()
    inner = PassThrough(next(iter(upstreams.values())), metrics)
    gateway = Gateway(config, registry, upstreams, servers(SHADOW_CONNECTIONS), inner, metrics, progress, observers)
    quiet_log()
    settings = uvicorn.Config(
        GatewayMiddleware(inner, gateway), lifespan="on", ws="none", log_config=None, access_log=False,
        http=bounded_protocol(config.limits.header_bytes),
        server_header=False, proxy_headers=False, backlog=BACKLOG, timeout_graceful_shutdown=DRAIN,
    )  # fmt: skip
    return uvicorn.Server(settings)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens; EngineError where it cannot."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise EngineError(f"port {port} on {host}: {error.strerror}", "choose another with --port") from None
    return listener


def _address(host: str, listener: socket.socket) -> str:
    shown = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
