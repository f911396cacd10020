"""Adapters that come and go on a running vLLM, through its API."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from uuid import uuid4

from lora2serve.artifacts.export_dir import Export
from lora2serve.config.model_name import refuse_name
from lora2serve.errors import EngineError, UsageError
from lora2serve.system import scratch
from lora2serve.system.hardware import cache_folder
from lora2serve.system.http import HttpClient, HttpStatus
from lora2serve.system.json_values import objects
from lora2serve.system.small_files import digest

PATIENCE = 300.0  # seconds that loading an adapter may take
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@dataclass(frozen=True)
class ServedModel:
    """What requests may name: a model, or an adapter on one."""

    name: str
    path: str  # where the server has it from
    parent: str | None  # of an adapter: the name of its base


def cache() -> Path:
    """The directory of the copies that servers serve."""
    return cache_folder() / "adapters"


def list_models(address: str) -> list[ServedModel]:
    """The models of a running server, the base first."""
    entries = objects(_client(address).call("GET", "/v1/models").get("data"))
    return [
        ServedModel(
            str(entry.get("id")), str(entry.get("root") or ""), str(entry["parent"]) if entry.get("parent") else None
        )
        for entry in entries
    ]


def list_adapters(address: str) -> list[ServedModel]:
    """The adapters that a running server has by name."""
    return [model for model in list_models(address) if model.parent]


def add(address: str, name: str, adapter: Path, folder: Path | None = None) -> Path:
    """Load an adapter export into a running vLLM; the immutable copy that it serves, in ``folder`` or the cache."""
    refuse_name(name, "the adapter's name", "such as towns in towns=runs/towns/exports/adapter")
    copy = immutable_copy(name, adapter, folder)
    _post(address, LOAD, load_request(name, copy))
    return copy


def immutable_copy(name: str, adapter: Path, folder: Path | None = None) -> Path:
    """A copy of an adapter export that stays as it is, in ``folder`` or the cache; the one that is there, if it is.

    vLLM keeps prefix-cache blocks by path: each version gets a path of its own, named by its content.
    """
    export = Export.open(adapter)
    if export.target != "adapter":
        raise UsageError(f"{adapter}: not an adapter export", "`lora2serve export --target adapter` makes one, linted")
    problems = export.verify()
    if problems:
        raise EngineError(f"{adapter}: {problems[0]}", "export it again")
    return _copied(adapter, name, folder or cache())


def load_request(name: str, copy: Path) -> dict[str, str]:
    """What vLLM is sent at ``LOAD``."""
    return {"lora_name": name, "lora_path": str(copy.resolve())}


def remove(address: str, name: str) -> None:
    """Unload an adapter from a running vLLM."""
    _post(address, UNLOAD, {"lora_name": name})


def _copied(adapter: Path, name: str, folder: Path) -> Path:
    version = digest(adapter / "adapter_model.safetensors")["sha256"][:16]
    copy = folder / f"{name}-{version}"
    if not copy.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}-{uuid4().hex[:12]}"
        with scratch.claimed(partial):
            shutil.copytree(adapter, partial, copy_function=shutil.copyfile)  # for whoever runs the server to read
            partial.chmod(0o755)
            os.rename(partial, copy)
    return copy


def _post(address: str, path: str, body: Mapping[str, str]) -> None:
    try:
        _client(address).send("POST", path, body)
    except HttpStatus as error:
        unknown = error.status == HTTPStatus.NOT_FOUND
        hint = "start it with `lora2serve serve --allow-updates`" if unknown else error.hint
        raise EngineError(error.message, hint) from None


def _client(address: str) -> HttpClient:
    return HttpClient(address, patience=PATIENCE, key_variable="OPENAI_API_KEY", hint="check --url")
