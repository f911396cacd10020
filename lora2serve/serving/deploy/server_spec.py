"""What a rendering needs to know about the exports: the model, its adapters, the path of each, vLLM's arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from lora2serve.artifacts.export_dir import Export
from lora2serve.errors import UsageError
from lora2serve.exporting import bundle
from lora2serve.serving import serve_settings, server
from lora2serve.serving.server import ServeOptions

MODELS = "/models"  # where the files are in a container, as in the store: base/ and adapters/<name>/
IMAGE = "vllm/vllm-openai:v0.32.0"  # the version that the lint knows
PORT = server.PORT
STORE = "pvc://models"
GIB = 1 << 30
_ADAPTER = "-adapter"
LONGEST_LABEL = 50  # Kubernetes takes 63 characters, and its controllers add some

Document: TypeAlias = Mapping[str, object]  # of YAML


@dataclass(frozen=True)
class ServerSpec:
    """One server of vLLM. ``model`` is a Hub id, or the path in the container at which ``local`` is mounted."""

    name: str  # of the objects: letters, digits and '-'
    served: str  # what requests call the model
    model: str
    local: str | None = None
    revision: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> directory on this machine
    rank: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)  # vLLM's, out of the serve.yaml beside a merged model
    size: int = 0  # bytes of the files
    tensor: int = 1
    pipeline: int = 1
    engine_arguments: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = PORT
    store: str = STORE
    route: str = ""  # what clients ask for where several servers share that name,
    weight: int = 0  # each by its weight

    @property
    def gpus(self) -> int:
        """Devices of one replica."""
        return self.tensor * self.pipeline

    @property
    def volume(self) -> str:
        """Size to ask for, in GiB: the files and half as much again."""
        return f"{max(10, round(self.size * 1.5 / GIB))}Gi"

    def adapter_path(self, name: str) -> str:
        """An adapter's directory in the container."""
        return f"{MODELS}/{bundle.ADAPTERS}/{name}"

    def in_store(self, path: str) -> str:
        """The address in the store of a path in the container."""
        return f"{self.store.rstrip('/')}{path.removeprefix(MODELS)}"

    def claim(self) -> str:
        """The name of the volume claim that is the store."""
        return claim_of(self.store)

    def arguments(self, *, modules: bool = True) -> list[str]:
        """Everything behind ``vllm serve MODEL``; ``modules`` lists the adapters, where nothing else loads them."""
        words = ["--config", f"{self.model}/{bundle.CONFIG}"] if self.settings else []
        words += ["--served-model-name", self.served]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--tensor-parallel-size", str(self.tensor), "--pipeline-parallel-size", str(self.pipeline)]
        if self.adapters:
            words += ["--enable-lora", "--max-lora-rank", str(self.rank), "--max-loras", str(len(self.adapters))]
        if self.adapters and modules:
            words += ["--lora-modules", *(_module(name, self.adapter_path(name)) for name in self.adapters)]
        return [*words, *self.engine_arguments]


def claim_of(store: str) -> str:
    """The name in ``pvc://CLAIM``; UsageError for another store."""
    scheme, separator, name = store.partition("://")
    if scheme != "pvc" or not separator or not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name):
        raise UsageError(f"--store {store}: expected pvc://CLAIM for this kind")
    return name


def gather(exports: Sequence[Path], options: ServeOptions, store: str = STORE) -> ServerSpec:
    """The spec of a merged export, of a bundle, or of adapters of one base; UsageError for what vLLM does not serve."""
    opened = server.open_exports(exports)
    first = opened[0]
    if first.target not in ("vllm", "adapter", bundle.TARGET):
        raise UsageError(
            f"{first.path}: an export for {first.target}, which vLLM does not serve",
            "`lora2serve export --target vllm` or `--target adapter` makes one",
        )
    adapters: dict[str, Path] = {}
    if first.target == bundle.TARGET:
        adapters = first.members
    elif first.target == "adapter":
        adapters = {adapter.served_name: adapter.path for adapter in opened}
    model = _of_base(first, options.base) if adapters else _of_merged(first)
    return replace(
        model,
        name=_object_name(list(adapters), first.served_name),
        adapters={name: shown(path) for name, path in adapters.items()},
        rank=server.largest_rank(opened) if adapters else None,
        size=model.size + sum(map(_bytes, adapters.values())),
        tensor=options.tensor_parallel_size,
        pipeline=options.pipeline_parallel_size,
        engine_arguments=options.engine_arguments,
        host=options.host,
        port=options.port,
        store=store,
    )


def shown(path: Path) -> str:
    """Relative to the working directory where it is below that, so that the files can be kept and moved together."""
    absolute, here = path.resolve(), Path.cwd()
    return f"./{absolute.relative_to(here).as_posix()}" if absolute.is_relative_to(here) else str(absolute)


def _of_base(adapter: Export, base: str | None) -> ServerSpec:
    """A Hub id is kept, under the name that the adapters have for it; a directory is mounted."""
    record = adapter.manifest.base
    served, local = base or str(adapter.manifest.served_base), Path(base or record.path)
    size = _bytes(local) if local.is_dir() else 0
    if re.fullmatch(r"[\w.-]+/[\w.-]+", served) and not Path(served).is_dir():
        revision = None if base else record.revision
        return ServerSpec(bundle.BASE, bundle.BASE, served, revision=revision, size=size)
    return ServerSpec(bundle.BASE, bundle.BASE, f"{MODELS}/base", local=shown(local), size=size)


def _of_merged(export: Export) -> ServerSpec:
    name, file = export.served_name, export.path / bundle.CONFIG
    content = serve_settings.read(file) if file.is_file() else {}
    settings = {key.replace("-", "_"): value for key, value in content.items() if key != "served-model-name"}
    model = f"{MODELS}/{label(name)}"
    return ServerSpec(name, name, model, local=shown(export.path), size=_bytes(export.path), settings=settings)


def _object_name(adapters: Sequence[str], name: str) -> str:
    """What the server's own objects are called: one adapter's lie beside those of its run's merged model."""
    if len(adapters) == 1:
        return f"{label(adapters[0])[: LONGEST_LABEL - len(_ADAPTER)].rstrip('-')}{_ADAPTER}"
    return label("-".join(adapters) or name)


def _module(name: str, path: str) -> str:
    return json.dumps({"name": name, "path": path})


def label(name: str) -> str:
    """A name that Kubernetes takes for objects and labels; of a Service (RFC 1035) it begins with a letter."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    named = words if words[:1].isalpha() else f"model-{words}"
    return named[:LONGEST_LABEL].strip("-")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
