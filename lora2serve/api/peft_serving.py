"""``serve --engine peft``: runs and adapters of any kind, over transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from lora2serve.api.locate import Located, base_of_adapter, base_of_run, fetch, locate
from lora2serve.artifacts.export_dir import Export
from lora2serve.errors import EngineError, UsageError
from lora2serve.exporting.bundle import BASE
from lora2serve.progress import Progress
from lora2serve.serving.server import SAFE_PATH, ServeOptions, ServerCommand
from lora2serve.system.extras import install_hint
from lora2serve.system.worker_process import PYTHON

MODULE = "lora2serve.parity_check.engines.peft_server"


def peft_command(sources: Sequence[str | Path], options: ServeOptions, progress: Progress) -> ServerCommand:
    """A server for runs, adapters and adapter exports of one base, each by its name; ``runs/latest`` by default.

    UsageError for what shares no server, EngineError for adapters that PEFT does not lay on one base.
    """
    from lora2serve.parity_check.engines.served_peft import refuse_mixture

    if find_spec("uvicorn") is None:
        raise EngineError("--engine peft needs uvicorn", install_hint("gateway"))
    _refuse_options(options)
    located = [locate(source, progress) for source in sources] or [locate(None, progress)]
    adapters, bases = dict[str, str](), dict[str, Path]()
    for item in located:
        name, adapter, base = _opened(item, options.base, progress)
        if name in adapters or name == BASE:
            raise UsageError(f"{item.name}: served as {name}, as is another model", "copy it under another name")
        adapters[name], bases[name] = str(adapter.resolve()), base.resolve()
    if len(set(bases.values())) > 1:
        each = ", ".join(f"{name} on {base}" for name, base in bases.items())
        raise UsageError(f"adapters of several bases: {each}", "start a server for each, with --port")
    refuse_mixture(adapters)
    return _command(adapters, next(iter(bases.values())), options)


def _command(adapters: Mapping[str, str], base: Path, options: ServeOptions) -> ServerCommand:
    words = [*PYTHON, "-m", MODULE, "--base", str(base), "--adapters", json.dumps(adapters)]
    words += ["--host", options.host, "--port", str(options.port)]
    return ServerCommand(
        "peft", tuple(words), (BASE, *adapters), options.host, options.port, SAFE_PATH, base=str(base)
    )  # fmt: skip


def _opened(item: Located, base: str | None, progress: Progress) -> tuple[str, Path, Path]:
    """Name, adapter and base."""
    if item.run:
        return item.run.name, item.run.adapter, base_of_run(item.run.record.base, base, progress)[0]
    if not item.is_adapter:
        raise UsageError(f"{item.name}: no run and no adapter", "leave --engine peft out for an export")
    name = Export.open(item.path).served_name if item.is_export else item.path.resolve().name
    return name, item.path, fetch(base_of_adapter(item.path, base), progress)


def _refuse_options(options: ServeOptions) -> None:
    unusable = {
        "--allow-updates": options.allow_updates, "--trust-export": options.trust_export,
        "--tensor-parallel-size": options.tensor_parallel_size > 1,
        "--pipeline-parallel-size": options.pipeline_parallel_size > 1, "--": bool(options.engine_arguments),
    }  # fmt: skip
    if named := [option for option, requested in unusable.items() if requested]:
        raise UsageError(
            f"--engine peft with {', '.join(named)}: of vLLM, this server has no such thing", "leave it out"
        )
