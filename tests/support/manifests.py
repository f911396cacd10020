"""Manifests in tests: changed by their JSON, and exports that are little more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lora2serve.artifacts.manifest import FileEntry, Manifest
from lora2serve.system.small_files import digest


def change_manifest(directory: Path, **changes: Any) -> None:
    """Set top-level keys of an export's manifest, such as ``parity=...``."""
    Manifest.from_json({**Manifest.read(directory).to_json(), **changes}).write(directory)


def write_export(folder: Path, target: str, **changes: Any) -> Path:
    """An export as `inspect` and `serve` read it, with files that have next to nothing in them; no library is loaded."""
    folder.mkdir(parents=True)
    files = {"config.json": "{}", "serve.yaml": "served-model-name: model\ndtype: bfloat16\n"}
    if target in ("gguf", "ollama", "lmstudio"):
        files = {"model.gguf": "GGUF"}
    elif target == "adapter":
        files = {"adapter_config.json": "{}"}
    elif target == "bundle":
        modules = "".join(f"""  - '{{"name": "{name}", "path": "adapters/{name}"}}'\n""" for name in ("a", "b"))
        files = {
            "serve.yaml": f"model: org/base\nenable-lora: true\nmax-lora-rank: 8\nmax-loras: 2\nlora-modules:\n{modules}"
        }
        changes = {"bundle": ("a", "b"), "served_base": "org/base", "rank": 8, **changes}
        for name in ("a", "b"):
            write_export(folder / "adapters" / name, "adapter", name=name, rank=8, served_base="org/base")
    for name, content in files.items():
        (folder / name).write_text(content)
    entries = {name: FileEntry.from_json(digest(folder / name), name) for name in files}
    manifest = Manifest(target=target, files=entries)
    replace(manifest, **{"name": "model", **changes}).write(folder)
    return folder
