"""The protocol between a process and its workers, and a worker's main: the standard library only.

Run by its path, in any Python, with or without lora2serve: ``python -P worker_protocol.py FD WORKER``. ``WORKER`` is
``module:Class`` or ``/path/file.py:Class``; each public method of the class is a job. A message is a dictionary, sent
as its length and its JSON; bytes in it (of a tensor, say) follow the JSON as they are.
"""

from __future__ import annotations

import json
import os
import pkgutil
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FrameType
from typing import Any

HEADER = struct.Struct("!Q")
BYTES = "bytes follow"  # the key that stands in the JSON where bytes are: how many
FEW = "bytes as latin-1"  # the same, with the bytes themselves: lists of short ones are common
INLINE = 1024  # bytes at most
GRACE = 5.0  # seconds that a worker has to end once its parent is gone
INTERRUPTED = 130  # the exit code of one that was asked to end
NOTICE = 0.3  # seconds in which a worker that does nothing sees it by itself


class LinkClosed(Exception):
    """Nobody is at the other end any more."""


class AskedToEnd(KeyboardInterrupt):
    """By a signal to this process alone, or to all of a job: the parent did not go."""


class Link:
    """One end of a socket. ``advance`` and ``ask`` are what a job says to the parent while it runs."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: Mapping[str, object]) -> None:
        """Send one message; LinkClosed where nobody is there to read it."""
        blobs: list[memoryview] = []

        def encode(value: object) -> object:
            if isinstance(value, bytes | bytearray | memoryview):
                view = memoryview(value)
                if view.nbytes <= INLINE:
                    return {FEW: bytes(view).decode("latin-1")}
                blobs.append(view.cast("B"))
                return {BYTES: view.nbytes}
            if isinstance(value, os.PathLike):
                return os.fspath(value)
            raise TypeError(f"{type(value).__name__} is not JSON")

        content = json.dumps(message, default=encode).encode()
        try:
            self.socket.sendall(HEADER.pack(len(content)) + content)
            for blob in blobs:
                self.socket.sendall(blob)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise LinkClosed from error

    def receive(self) -> dict[str, Any]:
        """The next message; LinkClosed where the other end is, TimeoutError after the socket's timeout."""
        content = self._read(HEADER.unpack(self._read(HEADER.size))[0])
        message: dict[str, Any] = json.loads(content, object_hook=self._decode)
        return message

    def advance(self, done: int) -> None:
        """Say that the job goes on, and how much of it is done."""
        self.send({"advance": int(done)})

    def ask(self, question: object) -> Any:
        """The parent's answer."""
        self.send({"question": question})
        return self.receive()["answer"]

    def close(self) -> None:
        """Close this end. Safe twice."""
        self.socket.close()

    def _decode(self, value: dict[str, Any]) -> object:
        if FEW in value:
            return bytearray(value[FEW], "latin-1")
        return self._read(value[BYTES]) if BYTES in value else value

    def _read(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                count = self.socket.recv_into(view)
            except ConnectionResetError:
                count = 0
            if not count:
                raise LinkClosed
            view = view[count:]
        return buffer


def ask_to_end(number: int, frame: FrameType | None) -> None:
    """Have the job broken off, and what it began removed."""
    raise AskedToEnd


def end_with_parent(descriptor: int, ending: threading.Event) -> None:
    """End this process and everything it started once the parent is gone, whatever it is at. Runs in a thread."""
    hangup = select.poll()
    hangup.register(descriptor, 0)  # nothing but its end
    hangup.poll()
    if not ending.wait(NOTICE):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # it may have something to remove
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def load(worker: str) -> Callable[..., Any]:
    """The class that ``module:Class`` or ``/path/file.py:Class`` names."""
    source, _, name = worker.rpartition(":")
    if not source.endswith(".py"):
        factory: Callable[..., Any] = pkgutil.resolve_name(worker)
        return factory
    spec = spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    factory = getattr(module, name)
    return factory


def serve(link: Link, worker: str) -> int:
    """Make the worker by the parent's options, then do jobs until the parent says close, or is gone; the exit code."""
    code = 0
    failure: BaseException | None = None
    instance: Any = None
    ending = threading.Event()
    threading.Thread(target=end_with_parent, args=(link.socket.fileno(), ending), daemon=True).start()
    try:
        start = link.receive()
        with suppress(OSError):  # not everywhere
            Path("/proc/self/comm").write_text(start["name"][:15])  # what `ps` and `top` show
        try:
            instance = load(worker)(link, **start["options"])
        except Exception as error:  # the answer to the first job
            traceback.print_exc()
            failure = error
        while "job" in (request := link.receive()):
            if failure is not None:
                raise failure
            link.send({"result": getattr(instance, request["job"])(**request["arguments"])})
    except AskedToEnd:
        code = INTERRUPTED
    except (LinkClosed, KeyboardInterrupt):
        pass  # nobody is there to read a result
    except Exception as error:
        if error is not failure:
            traceback.print_exc()
        with suppress(LinkClosed):
            link.send(describe(error))
    ending.set()
    if hasattr(instance, "close"):
        instance.close()
    return code


def describe(error: BaseException) -> dict[str, str]:
    """An error as its parent reads it: ``error`` in words, ``hint``, and ``kind``, its class."""
    kind = type(error).__name__
    first = (str(error).strip().splitlines() or ["no message"])[0][:300]
    message = f"not installed ({first})" if isinstance(error, ModuleNotFoundError) else f"{kind}: {first}"
    return {"error": str(getattr(error, "message", message)), "hint": str(getattr(error, "hint", "")), "kind": kind}


def run(descriptor: int, worker: str) -> None:
    """The whole life of a worker process. Does not return: libraries with threads of their own would hang."""
    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a shell's background job it is ignored
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, ask_to_end)
    code = 0
    with suppress(KeyboardInterrupt):
        code = serve(Link(socket.socket(fileno=descriptor)), worker)
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    package = str(Path(__file__).parents[2])
    if ".py:" not in sys.argv[2] and package not in sys.path:
        sys.path.insert(0, package)
    run(int(sys.argv[1]), sys.argv[2])
