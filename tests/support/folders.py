"""What lies in a folder, to be held against what lay there before."""

from __future__ import annotations

from pathlib import Path


def content(folder: Path) -> dict[Path, bytes]:
    """Of all files below, and the folders."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
