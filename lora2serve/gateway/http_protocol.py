"""Uvicorn's side of a connection, with an end to what it takes in before a request is one, and to what it logs."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from lora2serve.gateway.upstreams import UpstreamError

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PATIENCE = 60.0  # seconds for a request's head, and for what is between two parts of a body
LOG = "uvicorn.error"
ADVICE = "No supported WebSocket library"  # none is wanted: what it goes with says that the upgrade is refused


def bounded_protocol(limit: int) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol, which refuses heads of over ``limit`` bytes while they come: it would keep them all."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class BoundedProtocol(HttpToolsProtocol):
        """Counts bytes since a head was complete or a part of a body came: of heads, and what stands around parts."""

        unread = 0
        deadline: asyncio.TimerHandle | None = None

        def data_received(self, data: bytes) -> None:
            self.unread += len(data)
            super().data_received(data)
            if self.transport.is_closing() or self.unread == 0:
                return
            if self.unread > limit:
                self.refuse(f"headers: over {limit} bytes")
            elif self.deadline is None:
                self.deadline = self.loop.call_later(PATIENCE, self.refuse, f"headers: not complete in {PATIENCE:g} s")

        def refuse(self, message: str) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response(message)
            else:  # another request of this connection is being answered
                self.transport.close()

        def progressed(self) -> None:
            self.unread = 0
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def on_headers_complete(self) -> None:
            self.progressed()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.progressed()
            super().on_body(body)

        def on_message_complete(self) -> None:
            self.progressed()
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self.progressed()
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
