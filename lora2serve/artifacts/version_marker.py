"""By what the directory of a version is known: a small file in it, which needs no database to be read."""

from __future__ import annotations

import json
from pathlib import Path

from lora2serve.errors import InputError
from lora2serve.system.small_files import read_json

MARKER = ".lora2serve-version.json"


def write_marker(directory: Path, name: str, number: int, sha256: str) -> None:
    """Say of which version a directory is."""
    content = {"name": name, "number": number, "sha256": sha256}
    (directory / MARKER).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_marker(directory: Path) -> tuple[str, int]:
    """Name and number of the version that a directory is of; InputError where it is of none."""
    content = read_json(directory / MARKER, f"not the directory of a version (no {MARKER})", InputError)
    name, number = content.get("name"), content.get("number")
    if not isinstance(name, str) or not isinstance(number, int):
        raise InputError(f"{directory / MARKER}: no name and number", "remove the directory: it is made again")
    return name, number


def is_of_version(directory: Path) -> bool:
    """Whether a directory is that of a version of a registry."""
    return (directory / MARKER).is_file()
