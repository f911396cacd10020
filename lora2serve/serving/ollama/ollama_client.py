"""Ollama's REST API (docs/api.md in its repository), as far as it is used here. Standard library only.

Errors of the server come as ``{"error": ...}``, with a status of 400 or more, or as the last line of a stream that
began well. Blobs are sent in blocks of 1 MiB, so memory does not grow with the file.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora2serve.errors import EngineError, UsageError
from lora2serve.progress import Progress

PORT = 11434
BLOCK = 1 << 20
TRIES = 3  # of an upload whose line was cut
CONNECT, ANSWER = 10.0, 1800.0  # seconds; creating a model copies it, and a large one takes long to load


class NoServer(EngineError):
    """Nobody answers at that address, or not Ollama."""


class _Cut(Exception):
    """The line broke within an upload."""


def server_address(given: str | None = None) -> str:
    """``http://host:port`` as Ollama's own client reads OLLAMA_HOST (``envconfig/config.go``)."""
    text = (os.environ.get("OLLAMA_HOST", "") if given is None else given).strip().strip("\"'").strip()
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = "http", text
    if scheme not in ("http", "https"):
        raise UsageError(f"OLLAMA_HOST={text}: expected host:port, http://... or https://...")
    place, slash, path = rest.partition("/")
    usual = {"http": 80, "https": 443}[scheme] if found else PORT
    try:
        bare = _is_ip6(place.strip("[]"))
        url = urlsplit(f"//[{place.strip('[]')}]" if bare else f"//{place}")
        host, port = url.hostname or "127.0.0.1", usual if url.port is None else url.port
    except ValueError:
        raise UsageError(f"OLLAMA_HOST={text}: no such port", "expected host:port, such as 127.0.0.1:11434") from None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # where a server listens to all, a client takes one
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{(slash + path).rstrip('/')}"


def _is_ip6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False


class Client:
    """A server at ``address``; without one, that of OLLAMA_HOST or this machine's."""

    def __init__(self, address: str | None = None) -> None:
        self.address = server_address(address)
        self._url = urlsplit(self.address)

    def version(self) -> str:
        """Its version; NoServer where nobody answers, or another server does."""
        try:
            return str(self._call("GET", "/api/version")["version"])
        except NoServer:
            raise
        except (EngineError, KeyError, TypeError):
            raise NoServer(f"{self.address} answers, but is no Ollama", "OLLAMA_HOST names another address") from None

    def has_blob(self, digest: str) -> bool:
        """Whether ``sha256:<hex>`` is in its store."""
        with closing(self._connect()) as connection:
            self._send(connection, "HEAD", f"/api/blobs/{digest}", {})
            return connection.getresponse().status == http.client.OK

    def upload(self, digest: str, path: Path, progress: Progress) -> None:
        """A file into its store. A cut line is tried again: Ollama takes a blob whole."""
        size = path.stat().st_size
        with progress.track(f"upload {path.name}", size, "bytes") as advance:
            for attempt in range(TRIES):
                sent = [0]

                def tell(count: int, sent: list[int] = sent) -> None:
                    sent[0] += count
                    advance(count)

                try:
                    self._upload(digest, path, size, tell)
                    return
                except _Cut as error:
                    advance(-sent[0])
                    if attempt == TRIES - 1:
                        raise EngineError(
                            f"{self.address}: the upload of {path.name} broke off ({error})",
                            "run the same command again: what is there is not sent twice",
                        ) from None

    def create(self, body: Mapping[str, Any]) -> Iterator[str]:
        """Make a model; yields what the server says while it works."""
        said = ""
        for line in self._stream("/api/create", {**body, "stream": True}):
            said = str(line.get("status", ""))
            yield said
        if said != "success":
            raise EngineError(f"{self.address}: creating {body.get('model')} ended without success: {said!r}")

    def delete(self, model: str) -> None:
        """Remove a model; what it shares with others stays."""
        self._call("DELETE", "/api/delete", {"model": model})

    def show(self, model: str) -> dict[str, Any]:
        """What the server knows of a model: template, system, parameters, model_info."""
        return self._call("POST", "/api/show", {"model": model})

    def chat(self, model: str, messages: Any, **more: Any) -> dict[str, Any]:
        """One answer to a conversation, whole; an error where it is not done."""
        return self._answer("/api/chat", {"model": model, "messages": list(messages), **more})

    def render(self, model: str, messages: Any) -> str:
        """The prompt that the server makes of a conversation."""
        said = self._call("POST", "/api/chat", {
            "model": model, "messages": list(messages), "stream": False, "_debug_render_only": True,
        })  # fmt: skip
        info = said.get("_debug_info")
        if not isinstance(info, dict) or "rendered_template" not in info:
            raise EngineError(f"{self.address}: shows no prompt (_debug_render_only)", "update Ollama")
        return str(info["rendered_template"])

    def generate(self, model: str, prompt: str, **more: Any) -> dict[str, Any]:
        """The continuation of a text as it is, without any template."""
        return self._answer("/api/generate", {"model": model, "prompt": prompt, "raw": True, **more})

    def _answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        said = self._call("POST", path, {**body, "stream": False})
        if said.get("done") is not True:
            raise EngineError(
                f"{self.address}{path}: the answer is not whole (done is {said.get('done')!r})", "see Ollama's log"
            )
        return said

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with closing(self._open(method, path, body)) as response:
            raw = response.read()
        try:
            said = json.loads(raw) if raw.strip() else {}
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise EngineError(f"{self.address}{path}: no JSON in the answer: {_words(raw)}")
        return said

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with closing(self._open("POST", path, body)) as response:
            for raw in response:
                if not raw.strip():
                    continue
                line = json.loads(raw)
                if "error" in line:
                    raise EngineError(f"{self.address}{path}: {_words(line['error'])}")
                yield line

    def _open(self, method: str, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        connection = self._connect()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        data = json.dumps(body).encode() if body is not None else b""
        try:
            self._send(connection, method, path, {**headers, "Content-Length": str(len(data))})
            connection.send(data)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EngineError(f"{self.address}{path}: the line broke ({error or type(error).__name__})") from None
        if response.status >= http.client.BAD_REQUEST:
            raise EngineError(f"{self.address}{path} answers {response.status}: {_error(response)}")
        return response

    def _upload(self, digest: str, path: Path, size: int, tell: Any) -> None:
        with closing(self._connect()) as connection, path.open("rb") as file:
            self._send(connection, "POST", f"/api/blobs/{digest}", {"Content-Length": str(size)})
            broken: Exception | None = None
            try:
                while block := file.read(BLOCK):
                    connection.send(block)
                    tell(len(block))
            except (OSError, http.client.HTTPException) as error:
                broken = error  # it may have said why before it hung up
            try:
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise _Cut(str(broken or error) or type(error).__name__) from None
            if response.status >= http.client.BAD_REQUEST:
                raise EngineError(
                    f"{self.address} refuses {path.name} with {response.status}: {_error(response)}",
                    "did it change since the export? Then export again"
                    if response.status == http.client.BAD_REQUEST
                    else "",
                )

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._url.hostname), self._url.port, timeout=CONNECT)
        try:
            connection.connect()
        except OSError as error:
            raise NoServer(f"no Ollama answers at {self.address} ({error})", "`ollama serve` starts one") from None
        connection.sock.settimeout(ANSWER)
        return connection

    def _send(self, connection: http.client.HTTPConnection, method: str, path: str, headers: Mapping[str, str]) -> None:
        connection.putrequest(method, self._url.path + path)
        for key, value in {"User-Agent": "lora2serve", **headers}.items():
            connection.putheader(key, value)
        connection.endheaders()


def _error(response: http.client.HTTPResponse) -> str:
    """What the server says, in one line."""
    raw = response.read(1 << 16)
    try:
        said = json.loads(raw)
        return _words(said["error"])
    except (ValueError, KeyError, TypeError):
        return _words(raw)


def _words(said: Any) -> str:
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    return " ".join(text.split())[:300] or "nothing"
