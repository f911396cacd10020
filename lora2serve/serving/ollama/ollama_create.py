"""An export into a running Ollama: blobs, then the model, then one question."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name

from lora2serve.errors import EngineError, UsageError
from lora2serve.exporting import sinks
from lora2serve.progress import Progress
from lora2serve.serving.ollama.ollama_client import OllamaClient
from lora2serve.system.json_values import at

QUESTION = "Hello! Who are you?"
TOKENS = 128  # of the answer, at most
# types/model/name.go: [host/][namespace/]model[:tag]
_NAME = re.compile(
    r"([\w.-]+(:\d+)?/(?=.*/))?(\w[\w-]{0,79}/)?\w[\w.-]{0,79}(:\w[\w.-]{0,79})?",
    re.ASCII,
)


def refuse_name(name: str) -> None:
    """UsageError for a name that Ollama does not accept."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"--create {name!r}: invalid model name", "such as my-model, my-model:v2 or me/my-model")


def create(client: OllamaClient, export: Path, name: str, progress: Progress) -> None:
    """Make ``name`` of an Ollama export on a running server; EngineError with the server's own message."""
    request: Callable[[Path], tuple[Mapping[str, object], Mapping[str, Path]]] = resolve_name(sinks.OLLAMA_REQUEST)
    body, files = request(export)
    _refuse_older(client, str(body.get("requires") or ""))
    for digest, path in files.items():
        if client.has_blob(digest):
            progress.note(f"{path.name} is already uploaded")
        else:
            client.upload(digest, path, progress)
    for status in client.create({"model": name, **body}):
        progress.note(f"ollama: {status}")


def command(export: Path, name: str) -> str:
    """The line that makes the same model."""
    return f"ollama create {shlex.quote(name)} -f {shlex.quote(str(export / 'Modelfile'))}"


def ask(client: OllamaClient, name: str) -> str:
    """Its answer to a first question."""
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.chat(name, messages, options={"num_predict": TOKENS, "temperature": 0, "seed": 0})
    return str(at(answer, "message", "content") or "").strip()


def _refuse_older(client: OllamaClient, required: str) -> None:
    version = client.version()
    if required and _numbers(version) < _numbers(required):
        raise EngineError(
            f"Ollama {version} at {client.address}: this export needs {required} or newer",
            "update Ollama, or export --target gguf for llama.cpp",
        )


def _numbers(version: str) -> tuple[int, ...]:
    """``0.30.0-rc2`` -> (0, 30, 0); a build without a number (0.0.0) is a developer's own and counts as newest."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version.partition("-")[0])[:3])
    return numbers if any(numbers) else (1 << 30,)
