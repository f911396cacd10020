"""A child process for what may crash, hang, or need another Python: one that fails is an error, not the end.

The parent sends one JSON line per call and reads JSON lines back: signs of life, then a result or an error. The child
gets the two descriptors as its first arguments. What its libraries print goes into a log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora2serve.errors import EngineError

GRACE = 10.0  # seconds that a child has to end by itself once its pipe is closed


class WorkerProcess:
    """One child process: ``program IN OUT arguments``. ``call`` runs a job in it.

    ``limit`` is how many seconds may pass without a sign of life; None for work whose steps have no known bound.
    """

    def __init__(
        self, name: str, program: Sequence[str], arguments: Sequence[str], log: Path, limit: float | None,
        hint: str = "",
    ) -> None:  # fmt: skip
        self.name, self.log, self.limit, self._hint = name, log, limit, hint
        asked, self._to = os.pipe()
        self._from, answer = os.pipe()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*program, str(asked), str(answer), *arguments], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, env=environment, pass_fds=(asked, answer), start_new_session=True,
            )  # fmt: skip
        os.close(asked)
        os.close(answer)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # such as Ctrl-C: what it is at is wanted no more
            self._kill()
        self.close()

    def call(self, job: str, advance: Callable[[int], None] | None = None, **arguments: Any) -> Any:
        """The result of one job. EngineError says what went wrong; the child is then gone."""
        try:
            os.write(self._to, json.dumps({"job": job, "arguments": arguments}, default=str).encode() + b"\n")
        except BrokenPipeError:
            raise self._died() from None
        while True:
            answer = self._read()
            if "advance" in answer:
                if advance:
                    advance(answer["advance"])
                continue
            if "result" in answer:
                return answer["result"]
            self.close()
            raise self.failed(answer)

    def failed(self, answer: Mapping[str, Any]) -> EngineError:
        """The error that an answer tells of: ``error`` and ``hint``."""
        return EngineError(f"{self.name}: {answer['error']}", answer.get("hint") or f"its log: {self.log}")

    def close(self) -> None:
        """End the child and everything it started."""
        for descriptor in (self._to, self._from):
            if descriptor >= 0:
                os.close(descriptor)
        self._to = self._from = -1
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=GRACE)  # it ends by itself when its pipe closes
        self._kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        deadline = None if self.limit is None else time.monotonic() + self.limit
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._from], [], [], left)
            if not ready:
                self._kill()
                self.close()
                hint = f"{self._hint}its log ends: {self._last_words()}"
                raise EngineError(f"{self.name}: no sign of life for {self.limit:.0f} s", hint)
            part = os.read(self._from, 1 << 16)
            if not part:
                raise self._died()
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _died(self) -> EngineError:
        self.close()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EngineError(f"{self.name} died ({how}): {self._last_words()}", f"its log: {self.log}")

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        errors = [line for line in said if "Error" in line]
        return (errors or said or ["nothing"])[-1][:300]
