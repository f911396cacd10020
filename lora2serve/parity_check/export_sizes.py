"""What exports and bases weigh, in bytes."""

from __future__ import annotations

from pathlib import Path


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def weights_of(base: Path) -> int:
    """Bytes of a model's weights; of a repository that has them in two formats, those of safetensors."""
    files = [*base.glob("*.safetensors")] or [*base.glob("*.bin")]
    return sum(file.stat().st_size for file in files)
