"""What a rendering needs to know about the exports: the model, its adapters, where each lies, and vLLM's arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora2serve.adapters.lint import next_rank
from lora2serve.errors import UsageError
from lora2serve.exporting import bundle
from lora2serve.serving import server

MODELS = "/models"  # where the files lie in a container, as in the store: base/ and adapters/<name>/
IMAGE = "vllm/vllm-openai:v0.32.0"  # the version that the lint knows
PORT = 8000
STORE = "pvc://models"
GIB = 1 << 30
LABEL = 50  # Kubernetes takes 63 characters, and its controllers add some


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
    settings: Mapping[str, Any] = field(default_factory=dict)  # vLLM's, out of the serve.yaml beside a merged model
    size: int = 0  # bytes of the files
    tensor: int = 1
    pipeline: int = 1
    extra: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = PORT
    store: str = STORE

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
        scheme, found, name = self.store.partition("://")
        if scheme != "pvc" or not found or not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name):
            raise UsageError(f"--store {self.store}: expected pvc://CLAIM for this kind")
        return name

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
        return [*words, *self.extra]


def gather(
    exports: Sequence[Path], *, base: str | None, tensor: int, pipeline: int, extra: Sequence[str], host: str,
    port: int, store: str,
) -> ServerSpec:  # fmt: skip
    """Facts of a merged export, of a bundle, or of adapters of one base; UsageError for what vLLM does not serve."""
    about = server.read(exports)
    path, first = next(iter(about.items()))
    if first["target"] == bundle.TARGET:
        members = bundle.members(path, first)
    elif first["target"] == "adapter":
        members = {server.adapter_name(part, one): part for part, one in about.items()}
    elif first["target"] == "vllm":
        members = {}
    else:
        raise UsageError(
            f"{path}: an export for {first['target']}, which vLLM does not serve",
            "`lora2serve export --target vllm` or `--target adapter` makes one; --print alone prints the command",
        )
    model: dict[str, Any] = _of_base(first, base) if members else _of_merged(path, first)
    ranks = [int(one["rank"]) for one in about.values() if members]
    return ServerSpec(
        name=label("-".join(members) or str(first["name"])), adapters={name: shown(at) for name, at in members.items()},
        rank=next_rank(max(ranks)) if ranks else None, tensor=tensor, pipeline=pipeline, extra=tuple(extra), host=host,
        port=port, store=store, **{**model, "size": model["size"] + sum(_bytes(at) for at in members.values())},
    )  # fmt: skip


def shown(path: Path) -> str:
    """Relative to here where it lies below, so that the files can be kept and moved together."""
    whole, here = path.resolve(), Path.cwd()
    return f"./{whole.relative_to(here).as_posix()}" if whole.is_relative_to(here) else str(whole)


def _of_base(about: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """A Hub id stays one, under the name that the adapters have for it; a directory is mounted."""
    record = about.get("base") or {}
    served, local = base or str(about["served_base"]), Path(base or str(record.get("path")))
    size = _bytes(local) if local.is_dir() else 0
    if re.fullmatch(r"[\w.-]+/[\w.-]+", served) and not Path(served).is_dir():
        revision = None if base else record.get("revision")
        return {"served": bundle.BASE, "model": served, "revision": revision, "size": size}
    return {"served": bundle.BASE, "model": f"{MODELS}/base", "local": shown(local), "size": size}


def _of_merged(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    name, file = str(about["name"]), path / bundle.CONFIG
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = {key.replace("-", "_"): value for key, value in found.items() if key != "served-model-name"}
    return {
        "served": name, "model": f"{MODELS}/{label(name)}", "local": shown(path), "size": _bytes(path),
        "settings": settings,
    }  # fmt: skip


def _module(name: str, path: str) -> str:
    return json.dumps({"name": name, "path": path})


def label(name: str) -> str:
    """A name that Kubernetes takes for objects and labels."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LABEL].strip("-") or "model"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
