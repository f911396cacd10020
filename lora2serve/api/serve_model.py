"""``lora2serve.serve``: the engine that an export is for, started."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from lora2serve.api.export_request import Named, several
from lora2serve.api.peft_serving import peft_command
from lora2serve.api.registered import exports_of
from lora2serve.api.served_room import registry_room
from lora2serve.artifacts import run as runs
from lora2serve.artifacts.export_dir import Export
from lora2serve.config.arguments import checked
from lora2serve.config.model_name import ollama_name
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.progress import Progress, Silent
from lora2serve.serving import server, server_process
from lora2serve.serving.server import HOST, PORT, ServeOptions, ServerCommand
from lora2serve.system import scratch

Engine = Literal["vllm", "llama.cpp", "ollama", "peft"]
PREFERRED = ("vllm", "adapter", "gguf", "ollama", "lmstudio")  # of runs/latest, when no export is named
PATIENCE = 30  # seconds that an engine gets to end by itself


@dataclass(frozen=True)
class RunningServer:
    """An engine that answers at ``address``. Use it in a ``with`` statement, or ``close`` it; Ollama runs on."""

    address: str
    models: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None

    def close(self) -> None:
        """End the engine, if it was started here."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@checked
def serve(
    exports: Named | Sequence[Named] = (), *,
    engine: Engine | None = None, base: Named | None = None, host: str = HOST, port: int = PORT,
    tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1, allow_updates: bool = False,
    engine_arguments: str | Sequence[str] = (), trust_export: bool = False, progress: Progress | None = None,
) -> RunningServer:  # fmt: skip
    """Start the engine that an export is for, and return once it answers.

    exports: an export, a bundle, or several adapters of one base, which share one server; by default one of
        ``runs/latest``.
    engine: "vllm", "llama.cpp" or "ollama"; by default the one that the export is for. A running Ollama gets the model.
        "peft" serves runs and adapters of any kind, which ``exports`` then are: one request at a time, in transformers.
    base: for adapters, the base to load; the one trained on by default.
    host, port: where clients connect; 127.0.0.1 and 8000 by default. The host 0.0.0.0 lets any machine connect.
    tensor_parallel_size, pipeline_parallel_size: GPUs that share each layer, and groups of layers.
    allow_updates: let clients load and unload adapters: for trusted clients only.
    engine_arguments: more arguments for the engine, such as ``["--max-model-len", "8192"]``.
    trust_export: pass the export's serve.yaml on as it is, whatever is in it. By default only what ``export`` writes.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises UsageError for exports that cannot share a server, EngineError for an engine that is not installed or ends.
    """
    paths = tuple(Path(export) for export in several(exports))
    options = ServeOptions(
        engine, str(base) if base else None, host, port, allow_updates, tensor_parallel_size, pipeline_parallel_size,
        several(engine_arguments), trust_export,
    )  # fmt: skip
    progress = progress or default_progress()
    if engine == "ollama":
        return serve_in_ollama(paths, options, progress)
    command = _plan(paths, options, progress)
    log = scratch.log_file("serve")
    progress.note(f"starting {command.engine}; its log: {log}")
    process = server_process.start(command, log)
    progress.note(f"{command.address} serves {command.served}")
    return RunningServer(command.address, command.models, process, log)


def serve_until_stopped(exports: Sequence[Path], options: ServeOptions, progress: Progress) -> int:
    """What the command line does: run the engine, pass signals on, and return its exit code."""
    if options.engine == "ollama":
        serve_in_ollama(exports, options, progress)
        return 0
    command = _plan(exports, options, progress)
    if options.allow_updates:
        progress.warn("clients may load any adapter on this machine: vLLM calls that unsafe for untrusted clients")
    return server_process.run(command, progress)


def serving_command(exports: Sequence[Path], options: ServeOptions, progress: Progress | None = None) -> str:
    """The shell command that starts the same server."""
    if options.engine != "ollama":
        return _plan(exports, options, Silent() if progress is None else progress).line
    from lora2serve.serving import ollama

    path, name = _ollama_export(exports, options)
    return f"{ollama.command(path, name)} && ollama run {name}"


def serve_in_ollama(exports: Sequence[Path], options: ServeOptions, progress: Progress) -> RunningServer:
    """Ollama runs by itself: the model is created there, and stays."""
    from lora2serve.serving import ollama

    path, name = _ollama_export(exports, options)
    client = ollama.OllamaClient()
    client.version()
    ollama.create(client, path, name, progress)
    progress.note(f"{client.address} serves {name}")
    progress.note(server.first_question(client.address, name))
    return RunningServer(client.address, (name,))


def _plan(exports: Sequence[Path], options: ServeOptions, progress: Progress) -> ServerCommand:
    """With ``allow_updates``, a vLLM has room for what the registry may bring."""
    if options.engine == "peft":
        return peft_command(exports, options, progress)
    paths = chosen_exports(exports)
    if options.allow_updates and options.engine in (None, "vllm"):
        options = replace(options, room=registry_room(paths, progress))
    return server.plan(paths, options)


def _ollama_export(exports: Sequence[Path], options: ServeOptions) -> tuple[Path, str]:
    """The export to create in Ollama, and its name there."""
    unusable = {
        "--host": options.host != HOST,
        "--port": options.port != PORT,
        "--": bool(options.engine_arguments),
    }
    for option, requested in unusable.items():
        if requested:
            raise UsageError(f"--engine ollama with {option}: its server runs already", "OLLAMA_HOST names it")
    paths = chosen_exports(exports, ("ollama",))
    export = Export.open(paths[0])
    if len(paths) > 1 or not export.target.startswith("ollama"):
        raise UsageError(
            f"--engine ollama: {len(paths)} exports for {export.target}, expected one for ollama",
            "`lora2serve export --target ollama` makes one",
        )
    return export.path, ollama_name(export.served_name, export.target)


def chosen_exports(exports: Sequence[Path], targets: Sequence[str] = PREFERRED) -> list[Path]:
    """The exports that were named, or the default one; several versions share a server by their adapters."""
    paths = exports_of(exports, ("adapter", *targets) if len(exports) > 1 else targets)
    for path in paths:
        runs.refuse_cut_off(path)
    return paths or [_default_export(targets)]


def _default_export(targets: Sequence[str]) -> Path:
    """The export of ``runs/latest`` that is for the first of these targets."""
    exports = {Export.open(path).target: path for path in reversed(runs.latest().list_exports())}
    for target in targets:
        if target in exports:
            return exports[target]
    raise UsageError("runs/latest has no export to serve", f"`lora2serve export --target {targets[0]}` makes one")
