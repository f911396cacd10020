"""Adapters that come and go on a running vLLM, through its API."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from lora2serve.artifacts import manifest
from lora2serve.errors import EngineError, UsageError
from lora2serve.system.hardware import cache_folder
from lora2serve.system.small_files import digest


def cache() -> Path:
    """Where the copies lie that servers serve."""
    return cache_folder() / "adapters"


def add(address: str, name: str, adapter: Path, cache: Path) -> Path:
    """Load an adapter export into a running vLLM; the immutable copy that it serves.

    vLLM keeps prefix-cache blocks by path: each version gets a path of its own, named by its content.
    """
    if manifest.read(adapter)["target"] != "adapter":
        raise UsageError(f"{adapter}: no adapter export", "`lora2serve export --target adapter` makes one, linted")
    problems = manifest.verify(adapter)
    if problems:
        raise EngineError(f"{adapter}: {problems[0]}", "export it again")
    version = digest(adapter / "adapter_model.safetensors")["sha256"][:16]
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
