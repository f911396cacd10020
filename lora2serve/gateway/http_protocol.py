"""Uvicorn's side of a connection, with an end to what it takes in before a request is one, and to what it logs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from lora2serve.gateway.upstreams import UpstreamError

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PATIENCE = 60.0  # seconds for a request's head, and for what is between two parts of a body
LOG = "uvicorn.error"
ADVICE = "No supported WebSocket library"  # none is wanted: what it goes with says that the upgrade is refused


class UnreadBytes:
    """Bytes since a head was complete or a part of a body came: of heads, and what stands around parts.

    ``refuse`` hears why they are not waited for any longer.
    """

    def __init__(self, limit: int, refuse: Callable[[str], None]) -> None:
        self._limit, self._refuse, self._count = limit, refuse, 0
        self._deadline: asyncio.TimerHandle | None = None

    def add(self, count: int) -> None:
        """So many came; what is complete with them is told by ``clear``, and the rest by ``check``."""
        self._count += count

    def clear(self) -> None:
        """They were a head, or a part of a body."""
        self._count = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def check(self) -> None:
        """Whether what is left may still become one."""
        if self._count > self._limit:
            self._refuse(f"headers: over {self._limit} bytes")
        elif self._count and self._deadline is None:
            late = f"headers: not complete in {PATIENCE:g} s"
            self._deadline = asyncio.get_running_loop().call_later(PATIENCE, self._refuse, late)


def bounded_protocol(limit: int) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol, which refuses heads of over ``limit`` bytes while they come: it would keep them all."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class BoundedProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.unread = UnreadBytes(limit, self.refuse)
            super().connection_made(transport)

        def data_received(self, data: bytes) -> None:
            self.unread.add(len(data))
            super().data_received(data)
            if not self.transport.is_closing():
                self.unread.check()

        def refuse(self, message: str) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response(message)
            else:  # another request of this connection is being answered
                self.transport.close()

        def on_headers_complete(self) -> None:
            self.unread.clear()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.unread.clear()
            super().on_body(body)

        def on_message_complete(self) -> None:
            self.unread.clear()
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self.unread.clear()
            super().connection_lost(exc)

    return BoundedProtocol


def quiet_log() -> None:
    """A server that breaks off an answer is one line of uvicorn's log, and no error of the gateway's."""
    logging.getLogger(LOG).addFilter(_worded)


def _worded(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UpstreamError):
        record.msg, record.args, record.exc_info = error.message, (), None
    return not record.getMessage().startswith(ADVICE)
