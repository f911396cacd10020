"""Ollama's REST API (docs/api.md in its repository), as far as it is used here.

Errors of the server come as ``{"error": ...}``, with a status of 400 or more, or as the last line of a stream that
began well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from lora2serve.errors import EngineError, UsageError
from lora2serve.progress import Progress
from lora2serve.system.http import (
    ConnectionLost,
    HttpClient,
    HttpStatus,
    InvalidAnswer,
    NoResponse,
    Unreachable,
    without_credentials,
)
from lora2serve.system.json_values import Json, at, objects

PORT = 11434
TRIES = 3  # of an upload whose connection was lost
CONNECT, GREETING, ANSWER = (
    10.0,
    30.0,
    1800.0,
)  # seconds; creating a model copies it, and a large one takes long to load

Messages = Sequence[Mapping[str, object]]


class NoServer(EngineError):
    """Nobody answers at that address, or not Ollama."""


def server_address(address: str | None = None) -> str:
    """``http://host:port`` as Ollama's own client reads OLLAMA_HOST (``envconfig/config.go``)."""
    text = (os.environ.get("OLLAMA_HOST", "") if address is None else address).strip().strip("\"'").strip()
    shown = without_credentials(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    if scheme not in ("http", "https"):
        raise UsageError(f"OLLAMA_HOST={shown}: expected host:port, http://... or https://...")
    authority, slash, path = rest.partition("/")
    credentials, at_sign, host_port = authority.rpartition("@")
    usual = {"http": 80, "https": 443}[scheme] if separator else PORT
    try:
        bare_ip6 = _is_ip6(host_port.strip("[]"))
        url = urlsplit(f"//[{host_port.strip('[]')}]" if bare_ip6 else f"//{host_port}")
        host, port = url.hostname or "127.0.0.1", usual if url.port is None else url.port
    except ValueError:
        raise UsageError(f"OLLAMA_HOST={shown}: invalid port", "expected host:port, such as 127.0.0.1:11434") from None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # where a server listens to all, a client takes one
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{credentials}{at_sign}{host}:{port}{(slash + path).rstrip('/')}"


def _is_ip6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False


class OllamaClient:
    """A server at ``address``; without one, that of OLLAMA_HOST or this machine's."""

    def __init__(self, address: str | None = None) -> None:
        self._http = HttpClient(server_address(address), patience=ANSWER, connect=CONNECT)
        self.address = self._http.address

    def version(self) -> str:
        """Its version; NoServer where nobody answers, or another server does."""
        other = NoServer(f"{self.address} answers, but is not Ollama", "OLLAMA_HOST names another address")
        try:
            version = self._call("GET", "/api/version", patience=GREETING).get("version")
        except (HttpStatus, InvalidAnswer):
            raise other from None
        except (NoResponse, ConnectionLost) as error:
            raise NoServer(error.message, "`ollama serve` starts one; OLLAMA_HOST names another address") from None
        if not isinstance(version, str):
            raise other
        return version

    def has_blob(self, digest: str) -> bool:
        """Whether ``sha256:<hex>`` is in its store."""
        with self._reached():
            return self._http.has(f"/api/blobs/{digest}")

    def upload(self, digest: str, path: Path, progress: Progress) -> None:
        """A file into its store. A lost connection is tried again: Ollama does not resume a blob."""
        with progress.track(f"upload {path.name}", path.stat().st_size, "bytes") as advance:
            for attempt in range(1, TRIES + 1):
                sent: list[int] = []

                def count(size: int, sent: list[int] = sent) -> None:
                    sent.append(size)
                    advance(size)

                try:
                    self._upload(digest, path, count)
                    return
                except ConnectionLost as error:
                    advance(-sum(sent))
                    if attempt == TRIES:
                        raise EngineError(
                            f"{error.message}; {TRIES} tries to upload {path.name}",
                            "run the same command again: what arrived is not sent again",
                        ) from None

    def create(self, body: Mapping[str, object]) -> Iterator[str]:
        """Make a model; yields the status that the server reports while it works."""
        status = ""
        with self._reached():
            for line in self._http.lines("/api/create", {**body, "stream": True}):
                if "error" in line:
                    raise EngineError(f"{self.address}/api/create: {line['error']}")
                status = str(line.get("status", ""))
                yield status
        if status != "success":
            raise EngineError(f"{self.address}: creating {body.get('model')} ended without success: {status!r}")

    def delete(self, model: str) -> None:
        """Remove a model; what it shares with others stays."""
        self._call("DELETE", "/api/delete", {"model": model})

    def models(self) -> list[str]:
        """The names of the models in its store."""
        return [str(model.get("name")) for model in objects(self._call("GET", "/api/tags").get("models"))]

    def show(self, model: str) -> Json:
        """What the server knows of a model: template, system, parameters, model_info."""
        return self._call("POST", "/api/show", {"model": model})

    def chat(self, model: str, messages: Messages, **more: object) -> Json:
        """One answer to a conversation, complete; an error where it is not done."""
        return self._answer("/api/chat", {"model": model, "messages": list(messages), **more})

    def render(self, model: str, messages: Messages) -> str:
        """The prompt that the server makes of a conversation."""
        answer = self._call("POST", "/api/chat", {
            "model": model, "messages": list(messages), "stream": False, "_debug_render_only": True,
        })  # fmt: skip
        prompt = at(answer, "_debug_info", "rendered_template")
        if not isinstance(prompt, str):
            raise EngineError(f"{self.address}: shows no prompt (_debug_render_only)", "update Ollama")
        return prompt

    def generate(self, model: str, prompt: str, **more: object) -> Json:
        """The continuation of a text as it is, without any template."""
        return self._answer("/api/generate", {"model": model, "prompt": prompt, "raw": True, **more})

    def _answer(self, path: str, body: Mapping[str, object]) -> Json:
        answer = self._call("POST", path, {**body, "stream": False})
        if answer.get("done") is not True:
            raise EngineError(
                f"{self.address}{path}: the answer is not complete (done is {answer.get('done')!r})", "see Ollama's log"
            )
        return answer

    def _call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, patience: float | None = None
    ) -> Json:
        with self._reached():
            return self._http.call(method, path, body, patience=patience)

    def _upload(self, digest: str, path: Path, count: Callable[[int], None]) -> None:
        try:
            with self._reached():
                self._http.upload(f"/api/blobs/{digest}", path, count)
        except HttpStatus as error:
            changed = error.status == HTTPStatus.BAD_REQUEST
            raise EngineError(
                f"{self.address} refuses {path.name} with {error.status}: {error.reply}",
                "did it change since the export? Then export again" if changed else error.hint,
            ) from None

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except Unreachable as error:
            raise NoServer(
                f"no Ollama answers at {self.address} ({error.reason})", "`ollama serve` starts one"
            ) from None
