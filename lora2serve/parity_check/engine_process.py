"""Engines in worker processes: one that crashes or hangs is a failed row, not a failed program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora2serve.errors import EngineError
from lora2serve.system.extras import Extra, install_hint
from lora2serve.system.worker_process import Fork, WorkerProcess

TIMEOUT = 600.0  # seconds without a response
WORKER = "lora2serve.parity_check.worker:EngineWorker"
EXTRAS: dict[str, Extra] = {
    "peft": "train",
    "transformers": "train",
    "vllm": "vllm",
    "vllm-server": "vllm",
    "llama.cpp": "gguf",
}


class EngineMissing(EngineError):
    """The engine is not installed, or no server answers."""


MISSING = {EngineMissing.__name__, ModuleNotFoundError.__name__}


class EngineProcess(WorkerProcess):
    """One process with one engine. ``call`` runs a job of its ``worker`` there; arrays go through files."""

    def __init__(
        self, engine: str, options: Mapping[str, object], log: Path, limit: float = TIMEOUT, *, worker: str = WORKER,
        hint: str = "raise the limit with parity.limit; ", fork: Fork = "always",
    ) -> None:  # fmt: skip
        super().__init__(engine, worker, {"engine": engine, "options": options}, log, limit, hint, fork=fork)

    def failed(self, message: Mapping[str, str]) -> EngineError:
        missing = message["kind"] in MISSING
        kind = EngineMissing if missing else EngineError
        install = install_hint(EXTRAS[self.name]) if missing and self.name in EXTRAS else ""
        return kind(f"{self.name}: {message['error']}", message["hint"] or install)
