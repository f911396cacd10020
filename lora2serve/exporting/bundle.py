"""Several adapters of one base in one directory, for one vLLM server.

DIR/adapters/<name>/   an adapter export, with its own manifest; the folder is also what vLLM's filesystem
                       resolver reads: it asks for base_model_name_or_path to be the server's ``--model``
    serve.yaml         for ``vllm serve --config serve.yaml``, started in DIR
    lora2serve.json    the manifest of the whole
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lora2serve.adapters.lint import next_rank
from lora2serve.artifacts import staging
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.manifest import Manifest, versions
from lora2serve.errors import ExportError, Lora2ServeError, UsageError
from lora2serve.exporting import sinks, stream
from lora2serve.exporting.sinks import ExportModel
from lora2serve.exporting.stream import ExportPlan
from lora2serve.progress import Progress
from lora2serve.system.small_files import JsonObject

TARGET = "bundle"
ADAPTERS = "adapters"
CONFIG = "serve.yaml"
BASE = "base"  # what a server calls the base in requests


def export(
    models: Sequence[ExportModel], options: Any, out: Path, progress: Progress, *, overwrite: bool = False
) -> Export:
    """Write every adapter and the server's configuration into ``out``; all of it, or nothing.

    ``options`` are those of the adapter target. UsageError for names or bases that do not go together, ExportError
    with every adapter's refusal before the first byte.
    """
    dry_run(models, options, out)
    options = _for_one_base(models, options)
    with staging.opened(out, overwrite=overwrite) as staged:
        exports = [
            export
            for model in models
            for export in stream.export(model, [_plan(model, options, staged.path)], progress)
        ]
        rank = next_rank(max(export.manifest.rank or 1 for export in exports))
        staged.text(CONFIG, serve_yaml(options.served_base, models, rank))
        return staged.publish(
            Manifest(
                target=TARGET,
                name="+".join(model.name for model in models),
                bundle=tuple(model.name for model in models),
                base=models[0].lineage.base,
                served_base=options.served_base,
                rank=rank,
                use=f"cd {shlex.quote(str(staged.target))} && vllm serve --config {CONFIG}",
                versions=versions(),
            )
        )


def dry_run(models: Sequence[ExportModel], options: Any, out: Path) -> ExportPlan:
    """``stream.dry_run`` for all adapters together; raises every refusal, and writes nothing."""
    _refuse_names([model.name for model in models])
    refuse_other_bases({model.name: model.lineage.base for model in models})
    options = _for_one_base(models, options)
    plans, refusals = [], []
    for model in models:
        try:
            plans.append(stream.dry_run(model, [_plan(model, options, out)]))
        except Lora2ServeError as error:
            refusals.append(_named(error, model.name))
    if refusals:
        raise ExportError("\n".join(error.message for error in refusals), refusals[0].hint)
    return ExportPlan(
        tensors=max(plan.tensors for plan in plans),
        changed=max(plan.changed for plan in plans),
        outputs={name: output for plan in plans for name, output in plan.outputs.items()},
        disk=sum(plan.disk for plan in plans),
        free=plans[0].free,
        memory=max(plan.memory for plan in plans),
    )


def serve_yaml(model: str, models: Sequence[ExportModel], rank: int | None) -> str:
    """Arguments for ``vllm serve --config serve.yaml``. Paths are relative, so that DIR can be moved."""
    modules = [json.dumps({"name": adapter.name, "path": f"{ADAPTERS}/{adapter.name}"}) for adapter in models]
    revision = models[0].lineage.base.revision
    lines = [
        f"# in this directory: vllm serve --config {CONFIG}",
        f"model: {json.dumps(model)}",
        *([f"revision: {json.dumps(revision)}"] if revision and not Path(model).is_dir() else []),
        f"served-model-name: {BASE}",
        "enable-lora: true",
        f"max-lora-rank: {rank}",
        f"max-loras: {len(models)}",
        "lora-modules:",
        *(f"  - '{module.replace(chr(39), chr(39) * 2)}'" for module in modules),
    ]
    return "\n".join(lines) + "\n"


def members(path: Path, manifest: JsonObject) -> dict[str, Path]:
    """The adapter exports in a bundle by name."""
    return {str(name): path / ADAPTERS / str(name) for name in manifest["bundle"]}


def refuse_other_bases(bases: Mapping[str, BaseRecord]) -> None:
    """UsageError where the adapters of the records ``bases``, by name, were trained on more than one base."""
    for (name, first), (other, second) in combinations(bases.items(), 2):
        hashed = first.files and second.files  # not on record for adapters without a run
        if first.fingerprint != second.fingerprint or (hashed and first.files != second.files):
            raise UsageError(
                f"adapters of different bases: {name} of {first.id}, {other} of {second.id}",
                "one server holds adapters of one base; merged exports (--target vllm) need a server each",
            )


def _refuse_names(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"several adapters are called {twice[0]}", "the run or directory gives the name: rename one")
    if BASE in names:
        raise UsageError(f"an adapter is called {BASE}, as the base is on the server", "rename the run or directory")


def _for_one_base(models: Sequence[ExportModel], options: Any) -> Any:
    """The same name of the base in every adapter: as asked, or its id; an absolute path where that is a directory."""
    base = models[0].base
    return replace(
        options, served_base=options.served_base or (str(Path(base).resolve()) if Path(base).is_dir() else base)
    )


def _plan(model: ExportModel, options: Any, out: Path) -> stream.Plan:
    return stream.Plan("adapter", sinks.find("adapter"), options, out / ADAPTERS / model.name)


def _named(error: Lora2ServeError, name: str) -> Lora2ServeError:
    return type(error)("\n".join(f"{name}: {line}" for line in error.message.splitlines()), error.hint)
