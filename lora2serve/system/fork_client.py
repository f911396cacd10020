"""Processes from a fork server, which has the heavy libraries loaded (see fork_server.py).

One server a process, started when the first worker is. ``LORA2SERVE_FORK_SERVER`` in the environment: ``0`` has every
worker start by itself; the path of a socket names another process's server, which then serves this one too.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from lora2serve.system import scratch
from lora2serve.system.fork_server import LINK, state
from lora2serve.system.worker_protocol import Link, LinkClosed

VARIABLE = "LORA2SERVE_FORK_SERVER"
OFF = "0"
SCRIPT = Path(__file__).with_name("fork_server.py")
IMPORT_ROOT = Path(__file__).parents[2]  # the directory that holds lora2serve
PATIENCE = 180.0  # seconds for the libraries to load on a busy machine
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")  # a process that has looked at a GPU cannot fork one that uses it
SETTINGS = {  # of every worker; PYTHONSAFEPATH is for what its libraries start
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1",
}  # fmt: skip


class ForkedProcess:
    """A child of the fork server; as much of subprocess.Popen as is needed."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None
        self._pidfd: int | None = None
        with suppress(ProcessLookupError):  # it has ended already
            self._pidfd = os.pidfd_open(pid)
            weakref.finalize(self, os.close, self._pidfd)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal; subprocess.TimeoutExpired where it has none yet."""
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = int(Link(self._status).receive()["code"])
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a forked process", timeout or 0) from None
            except LinkClosed:
                self._wait_alone(timeout)
                self.returncode = -signal.SIGKILL
            self._status.close()
        return self.returncode

    def _wait_alone(self, timeout: float | None) -> None:
        """Wait for the end of a child whose server is gone; nobody knows its exit code then."""
        if self._pidfd is None:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)


class ForkClient:
    """A connection to a fork server: our own, or the one at ``path``."""

    def __init__(self, path: str | None = None) -> None:
        folder = "" if path else tempfile.mkdtemp(prefix="fork-", dir=scratch.root())
        self.path = path or f"{folder}/socket"
        if path:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
        else:
            connection, theirs = socket.socketpair()
            with theirs:
                self._server = subprocess.Popen(
                    [sys.executable, "-P", str(SCRIPT), str(theirs.fileno()), self.path], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                    env={**os.environ, **SETTINGS, **scratch.environment()}, start_new_session=True,
                )  # fmt: skip
            weakref.finalize(self, _end, self._server, connection, folder, os.getpid())
        connection.settimeout(PATIENCE)
        self._link, self._owner = Link(connection), os.getpid()
        self._lock = threading.Lock()  # one request and its answer at a time

    @property
    def usable(self) -> bool:
        """Whether this process is the one that connected: a fork of it shares the socket, not the talk."""
        return self._owner == os.getpid() and self._link.socket.fileno() >= 0

    def start(
        self, function: str, arguments: Sequence[object], descriptors: Sequence[int], environment: Mapping[str, str],
        *, argv: Sequence[str] = ("",), folder: Path | None = None, path: Path = IMPORT_ROOT,
    ) -> ForkedProcess | None:  # fmt: skip
        """Call ``function`` in a fork; ``descriptors``: stdin, stdout, stderr and a link. None: it refuses."""
        ours, theirs = socket.socketpair()
        request = {
            "function": function, "arguments": arguments, "environment": environment, "state": state(environment),
            "argv": argv, "folder": folder or Path.cwd(), "path": path,
        }  # fmt: skip
        with theirs, self._lock:
            try:
                socket.send_fds(self._link.socket, [b"+"], [*descriptors[:3], theirs.fileno(), *descriptors[3:]])
                self._link.send(request)
                answer = self._link.receive()
            except (OSError, LinkClosed, ValueError):  # ValueError: whatever listens there is no fork server
                self._link.close()
                answer = {"pid": 0}
        if answer["pid"]:
            return ForkedProcess(answer["pid"], ours)
        ours.close()
        return None


def _end(server: subprocess.Popen[bytes], connection: socket.socket, folder: str, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:  # a fork of the process that started it
        return
    server.kill()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)


_clients: list[ForkClient] = []  # the one of this process
_starting = threading.Lock()


def client(start: bool = True) -> ForkClient | None:
    """The fork server of this process; None where it must not be used, or does not run and is not to be started."""
    named = os.environ.get(VARIABLE, "")
    if named == OFF or sys.platform != "linux" or any(Path(device).exists() for device in GPU_DEVICES):
        return None
    with _starting:
        if not (_clients and _clients[0].usable):
            if not (start or named):
                return None
            _clients[:] = _connected(named)
        return _clients[0] if _clients else None


def _connected(named: str) -> list[ForkClient]:
    """To the server that is named, or to one of our own where that has ended; to none where there is no room for it."""
    for path in [named, None] if named else [None]:
        with suppress(OSError):
            return [ForkClient(path)]
    return []


def fork_worker(
    worker: str, link: socket.socket, log: IO[bytes], environment: Mapping[str, str], start: bool
) -> ForkedProcess | None:
    """A worker from the fork server; None where it is to be started by itself."""
    server = client(start)
    if server is None:
        return None
    with open(os.devnull, "rb") as nothing:
        descriptors = [nothing.fileno(), log.fileno(), log.fileno(), link.fileno()]
        return server.start("lora2serve.system.worker_protocol:run", [LINK, worker], descriptors, environment)
