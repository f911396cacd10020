"""A server on 127.0.0.1 that sends exactly the bytes it is told, and breaks off, hangs or resets where it is told.

with RawServer(answer({"a": 1})) as server:                       # each connection, each request
    ...
with RawServer([b"HTTP/1.1 200 OK\\r\\n...", HANG]) as server:      # steps of every answer
    ...
server.requests                                                   # what came, as (head, body)
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

HANG: Literal["hang"] = "hang"  # says nothing more until the server ends
CLOSE: Literal["close"] = "close"  # an orderly end
RESET: Literal["reset"] = "reset"  # RST, and what was not sent is lost
Step = bytes | Literal["hang", "close", "reset"] | threading.Event  # an Event is waited for
NO_BODY = b"HTTP/1.1 204 No Content\r\n\r\n"


def answer(content: object, status: int = 200, kind: str = "application/json", **headers: str) -> list[Step]:
    """One complete answer; bytes and str as they are, everything else as JSON."""
    body = content if isinstance(content, bytes) else str(content).encode()
    if not isinstance(content, bytes | str):
        body = json.dumps(content).encode()
    return [head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **headers}), body]


def head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


def chunk(data: bytes) -> bytes:
    """A part of a chunked body; an empty one ends it."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class RawServer:
    """``steps`` answer every request; ``read`` is how many bytes of its body are taken before that (None: all)."""

    def __init__(self, steps: Sequence[Step] | Callable[[str, bytes], Sequence[Step]], read: int | None = None) -> None:
        self.steps, self.read = steps, read
        self.requests: list[tuple[str, bytes]] = []
        self.connections = 0
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> RawServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as stream:
            while True:
                lines = []
                while (line := stream.readline().decode().strip()) != "":
                    lines.append(line)
                if not lines:
                    return
                sizes = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")]
                size = sizes[0] if sizes else 0
                body = stream.read(size if self.read is None else min(size, self.read))
                request = ("\n".join(lines), body)
                self.requests.append(request)
                if not self._answer(connection, self.steps(*request) if callable(self.steps) else self.steps):
                    return

    def _answer(self, connection: socket.socket, steps: Sequence[Step]) -> bool:
        """Whether the connection goes on."""
        for step in steps:
            if isinstance(step, bytes):
                connection.sendall(step)
            elif isinstance(step, threading.Event):
                step.wait(10)
            elif step == HANG:
                self._over.wait()
                return False
            else:
                if step == RESET:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    connection.shutdown(socket.SHUT_RDWR)
                return False
        return True
