"""An Ollama made of real parts, on 127.0.0.1: llama.cpp answers, Go's text/template renders, blobs are checked.

It speaks what Ollama's docs/api.md and its source document of the REST API, as far as lora2serve uses it, and stands in
where no true Ollama is to be had; ``pytest -m ollama`` runs the same tests against a true one.

    with OllamaServer(tmp_path, go_render) as ollama:  # ollama.url goes into OLLAMA_HOST
        ollama.fail("blob", "reset")                   # the next upload's line is cut
        ollama.models["demo:latest"]                   # what it was told
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.golang import Renderer, TemplateError
from tests.support.ollama_engine import Loaded, Stored


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests to one endpoint.

    ``kind``: "status" answers ``status`` with ``message``; "early" the same before the body was read; "reset" cuts the
    line within the body; "corrupt" flips a bit of what arrives; "stream" ends a stream with an error; "short" ends it
    without success; "undone" answers ``done: false``; "html" is another server's answer.
    """

    endpoint: str
    kind: str
    status: int = 500
    message: str = "injected"
    times: int = 1


@dataclass
class OllamaServer:
    """The server and its state. ``version`` is what it says it is."""

    root: Path
    render: Renderer
    version: str = "0.33.0"
    models: dict[str, Stored] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blobs = self.root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self._loaded: tuple[str, Loaded] | None = None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"ollama": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> OllamaServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, endpoint: str, kind: str, **how: Any) -> None:
        self.faults.append(Fault(endpoint, kind, **how))

    def fault(self, endpoint: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.endpoint == endpoint and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, endpoint: str) -> int:
        return self.requests.count((method, endpoint))

    def load(self, name: str) -> Loaded:
        """The model, loaded; one at a time."""
        with self.lock:
            if self._loaded is None or self._loaded[0] != name or self._loaded[1].stored is not self.models[name]:
                self._loaded = (name, Loaded(self.models[name], self.render))
            return self._loaded[1]


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class _Handler(BaseHTTPRequestHandler):
    ollama: OllamaServer
    injected: Fault | None
    rest = 0
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def any(self) -> None:
        endpoint = self.path.removeprefix("/api/").split("/")[0].removesuffix("s")
        self.rest = int(self.headers.get("Content-Length") or 0)
        self.injected = self.ollama.fault(endpoint) if self.command != "HEAD" else None
        self.ollama.requests.append((self.command, endpoint))
        kind = self.injected.kind if self.injected else ""
        try:
            if self.injected and kind == "early":  # hangs up on what still comes
                self.close_connection = True
                self.send(self.injected.status, {"error": self.injected.message})
                self.wfile.flush()
                time.sleep(0.3)
                return self.cut()
            if kind == "reset":
                self.rfile.read(self.rest // 2)
                return self.cut()
            if self.injected and kind == "status":
                raise Refused(self.injected.status, self.injected.message)
            if kind == "html":
                return self.send_bytes(200, b"<html>hello</html>", "text/html")
            answer = getattr(self, f"do_{endpoint}", None)
            if answer is None:
                raise Refused(404, "404 page not found")
            answer()
        except Refused as refused:
            self.rfile.read(self.rest)
            self.send(refused.status, {"error": refused.message})

    do_GET = do_POST = do_HEAD = do_DELETE = any  # noqa: N815 - the names that http.server calls

    # -- reading and answering

    def body(self) -> dict[str, Any]:
        raw, self.rest = self.rfile.read(self.rest), 0
        try:
            return dict(json.loads(raw))
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def send(self, status: int, content: Any) -> None:
        self.send_bytes(status, json.dumps(content, ensure_ascii=False).encode(), "application/json")

    def send_bytes(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def stream(self, lines: list[dict[str, Any]]) -> None:
        self.send_bytes(200, b"".join(json.dumps(line).encode() + b"\n" for line in lines), "application/x-ndjson")

    def cut(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def finish(self) -> None:
        if self.connection.fileno() >= 0:
            super().finish()

    # -- endpoints

    def do_version(self) -> None:
        self.send(200, {"version": self.ollama.version})

    def do_tag(self) -> None:
        self.send(200, {"models": [{"name": name, "model": name} for name in self.ollama.models]})

    def do_blob(self) -> None:
        digest = self.path.rpartition("/")[2]
        path = self.ollama.blobs / digest.replace(":", "-")
        if self.command == "HEAD":
            return self.send_bytes(200 if path.is_file() else 404, b"", "text/plain")
        hashed, partial = hashlib.sha256(), path.with_suffix(f".{threading.get_ident()}")
        with partial.open("wb") as file:
            while self.rest and (block := self.rfile.read(min(self.rest, 1 << 20))):
                if self.injected and self.injected.kind == "corrupt":
                    block, self.injected = bytes([block[0] ^ 1]) + block[1:], None
                self.rest -= len(block)
                hashed.update(block)
                file.write(block)
        found = f"sha256:{hashed.hexdigest()}"
        if self.rest or found != digest:
            partial.unlink()
            raise Refused(400, f'digest mismatch, expected "{digest}", got "{found}"')
        partial.rename(path)
        return self.send_bytes(201, b"", "text/plain")

    def do_create(self) -> None:
        request = self.body()
        lines: list[dict[str, Any]] = []
        try:
            name = _full(str(request["model"]))
            stored = self.stored(request, lines)
        except (TemplateError, ValueError) as error:
            return self.stream([*lines, {"error": str(error)}])
        if self.injected and self.injected.kind in ("stream", "short"):
            end = [{"error": self.injected.message}] if self.injected.kind == "stream" else []
            return self.stream([*lines, *end])
        self.ollama.models[name] = stored
        return self.stream([*lines, {"status": "writing manifest"}, {"status": "success"}])

    def stored(self, request: dict[str, Any], lines: list[dict[str, Any]]) -> Stored:
        """What it becomes; the GGUF and the template must be what their readers take."""
        if "from" in request:
            base = self.ollama.models.get(_full(str(request["from"])))
            if base is None:
                raise ValueError("pull model manifest: file does not exist")
            stored = Stored(**vars(base))
        elif request.get("files"):
            stored = Stored(self.blob(next(iter(request["files"].values()))))
        else:
            raise Refused(400, "neither 'from' or 'files' was specified")
        for digest in (request.get("adapters") or {}).values():
            stored.adapter = self.blob(digest)
        lines.append({"status": "parsing GGUF"})
        for key in ("template", "system", "requires", "messages"):
            if request.get(key):
                setattr(stored, key, request[key])
        if stored.template:
            self.ollama.render(stored.template, {}, date.today())
        stored.parameters = {**stored.parameters, **(request.get("parameters") or {})}
        Loaded(stored, self.ollama.render)
        return stored

    def blob(self, digest: str) -> Path:
        path = self.ollama.blobs / digest.replace(":", "-")
        if not path.is_file():
            raise Refused(400, f"blob {digest} not found")
        return path

    def known(self, request: dict[str, Any]) -> str:
        name = _full(str(request.get("model", "")))
        if name not in self.ollama.models:
            raise Refused(404, f"model '{request.get('model')}' not found")
        return name

    def do_delete(self) -> None:
        del self.ollama.models[self.known(self.body())]
        self.send(200, {})

    def do_show(self) -> None:
        loaded = self.ollama.load(self.known(self.body()))
        stored, kinds = loaded.stored, {"true": True, "false": False}
        info = {key: kinds.get(value, value) for key, value in loaded.llm.metadata.items()}
        self.send(200, {"template": stored.template or loaded.jinja, "system": stored.system, "model_info": info,
                        "parameters": "\n".join(_shown(stored.parameters))})  # fmt: skip

    def do_chat(self) -> None:
        request = self.body()
        loaded = self.ollama.load(self.known(request))
        prompt = loaded.prompt(request["messages"])
        if request.get("_debug_render_only"):
            return self.send(200, {"model": request["model"], "_debug_info": {"rendered_template": prompt}})
        return self.answer(request, prompt, lambda text: {"message": {"role": "assistant", "content": text}})

    def do_generate(self) -> None:
        request = self.body()
        name = self.known(request)
        if not request.get("raw"):
            raise Refused(400, "this server of the tests answers raw prompts only")
        self.ollama.load(name)
        self.answer(request, request["prompt"], lambda text: {"response": text})

    def answer(self, request: dict[str, Any], prompt: str, put: Any) -> None:
        loaded = self.ollama.load(self.known(request))
        top = int(request.get("top_logprobs", 0))
        if not 0 <= top <= 20:
            raise Refused(400, "top_logprobs must be between 0 and 20")
        options = {**loaded.stored.parameters, **(request.get("options") or {})}
        continuation = loaded.complete(prompt, options, top if request.get("logprobs") else None)
        if self.injected and self.injected.kind == "undone":
            return self.send(200, {"model": request["model"], **put(continuation.text), "done": False})
        shown = {"logprobs": continuation.logprobs} if request.get("logprobs") else {}
        return self.send(200, {"model": request["model"], **put(continuation.text), **shown, "done": True,
                               "done_reason": continuation.reason, "prompt_eval_count": continuation.prompt_tokens,
                               "eval_count": len(continuation.logprobs)})  # fmt: skip


def _shown(parameters: dict[str, Any]) -> list[str]:
    """A line for each value, text in quotes."""
    lines = [(key, one) for key, value in parameters.items() for one in (value if isinstance(value, list) else [value])]
    return [f"{key:<30} {json.dumps(value, ensure_ascii=False)}" for key, value in lines]


def _full(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
