"""Engines in child processes: one that crashes or hangs is a failed row, not a failed program."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2serve.errors import EngineError
from lora2serve.system import worker_process
from lora2serve.system.extras import Extra, install_hint

LIMIT = 600.0  # seconds without a sign of life
EXTRAS: dict[str, Extra] = {
    "peft": "train",
    "transformers": "train",
    "vllm": "vllm",
    "vllm-server": "vllm",
    "llama.cpp": "gguf",
}


class EngineMissing(EngineError):
    """The engine is not installed, or no server answers."""


class EngineProcess(worker_process.WorkerProcess):
    """One child process with one engine. ``call`` runs a function of ``jobs.py`` there; arrays go through files."""

    def __init__(self, engine: str, options: Mapping[str, Any], log: Path, limit: float = LIMIT) -> None:
        program = [sys.executable, "-m", "lora2serve.parity_check.worker"]
        super().__init__(
            engine, program, [engine, json.dumps(options)], log, limit, hint="raise the limit with parity.limit; "
        )

    def failed(self, answer: Mapping[str, Any]) -> EngineError:
        missing = bool(answer["missing"])
        kind = EngineMissing if missing else EngineError
        way_out = install_hint(EXTRAS[self.name]) if missing and self.name in EXTRAS else ""
        return kind(f"{self.name}: {answer['error']}", str(answer["hint"] or way_out))
