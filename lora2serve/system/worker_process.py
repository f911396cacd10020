"""A worker: a child process for what may crash, hang or need another Python. One that fails is an error, not the end.

See worker_protocol.py for what is said between the two, and fork_client.py for how it starts within milliseconds. What
its libraries print goes into a log.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from lora2serve.errors import EngineError
from lora2serve.system import scratch, worker_protocol
from lora2serve.system.fork_client import SETTINGS, ForkedProcess, fork_worker
from lora2serve.system.worker_protocol import Link, LinkClosed

GRACE = 10.0  # seconds that a worker has to end by itself once it is told to
INTERRUPTED = 2.0  # the same after Ctrl-C
Fork = Literal["always", "if running", "never"]
PYTHON = (sys.executable, "-P")  # -P: nothing is imported from the current folder


class ChildProcess(Protocol):
    """What subprocess.Popen and ForkedProcess have in common."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code."""
        ...


class WorkerProcess:
    """One process with one worker, ``module:Class`` or ``/path/file.py:Class``. ``call`` runs one of its jobs.

    ``options`` make the worker. ``limit`` is how many seconds may pass without a response; None for work whose steps
    have no known bound. ``python`` is the command of another interpreter. ``fork``: whether it is a fork of the server,
    which the first ``always`` starts.
    """

    def __init__(
        self, name: str, worker: str, options: Mapping[str, object], log: Path, limit: float | None = None,
        hint: str = "", python: Sequence[str] = PYTHON, fork: Fork = "if running",
    ) -> None:  # fmt: skip
        self.name, self.log, self.limit, self._hint = name, log, limit, hint
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as file:
            environment = {**os.environ, **SETTINGS, **scratch.environment()}
            forked: ForkedProcess | None = None
            if python == PYTHON and fork != "never":
                forked = fork_worker(worker, theirs, file, environment, start=fork == "always")
            self._process: ChildProcess = forked or subprocess.Popen(
                [*python, worker_protocol.__file__, str(theirs.fileno()), worker], stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, env=environment, pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip
        self._link = Link(ours)
        self._code: int | None = None
        self._busy = False
        weakref.finalize(self, ours.close)
        with suppress(LinkClosed):  # the first call says why
            self._link.send({"options": options, "name": name})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(
        self, job: str, advance: Callable[[int], None] | None = None,
        answer: Callable[[Any], object] | None = None, **arguments: object,
    ) -> Any:  # fmt: skip
        """The result of one job; ``answer`` is what the job may ask. EngineError says what failed; the worker ends."""
        self._busy = True
        message = self._exchange({"job": job, "arguments": arguments})
        while "result" not in message:
            if "question" in message:
                assert answer is not None, f"{self.name} asks {message['question']!r}"
                message = self._exchange({"answer": answer(message["question"])})
                continue
            if "error" in message:
                self._busy = False
                self.close()
                raise self.failed(message)
            if advance:
                advance(message["advance"])
            message = self._exchange()
        self._busy = False
        return message["result"]

    def _exchange(self, said: Mapping[str, object] | None = None) -> dict[str, Any]:
        """What the worker says next, once it was told ``said``."""
        try:
            self._link.socket.settimeout(self.limit)
            if said is not None:
                self._link.send(said)
            return self._link.receive()
        except TimeoutError:
            raise self._silent() from None
        except (LinkClosed, OSError):
            raise self._died() from None

    def send_signal(self, number: signal.Signals) -> None:
        """Send the process a signal; nothing where it has ended."""
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def failed(self, message: Mapping[str, str]) -> EngineError:
        """What an error message means: its ``error``, ``hint`` and ``kind``."""
        return EngineError(f"{self.name}: {message['error']}", message["hint"] or f"its log: {scratch.keep(self.log)}")

    def died(self, code: int, last_line: str) -> EngineError:
        """What it means that the worker ended by itself."""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EngineError(f"{self.name} died ({how}): {last_line}", f"its log: {scratch.keep(self.log)}")

    def close(self) -> None:
        """End the worker and everything it started. Safe twice."""
        if self._code is None and self._busy:  # Ctrl-C, say: nobody waits for what it is at
            self._end(INTERRUPTED)
        elif self._code is None:
            with suppress(LinkClosed, OSError):
                self._link.send({"close": True})
            self._end(GRACE)

    def _end(self, seconds: float) -> None:
        if seconds < GRACE:
            self._link.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._code = self._process.wait()
        self._link.close()

    def _silent(self) -> EngineError:
        self._end(0.0)
        hint = f"{self._hint}its log ends: {self._last_line()}"
        return EngineError(f"{self.name}: no response for {self.limit:.0f} s", hint)

    def _died(self) -> EngineError:
        self._end(GRACE)
        return self.died(self._code or 0, self._last_line())

    def _last_line(self) -> str:
        content = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in content.split("\n") if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["nothing"])[-1][:300]
