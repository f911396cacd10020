"""Manifests in tests: changed by their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora2serve.artifacts.manifest import Manifest


def change_manifest(directory: Path, **changes: Any) -> None:
    """Set top-level keys of an export's manifest, such as ``parity=...``."""
    Manifest.from_json({**Manifest.read(directory).to_json(), **changes}).write(directory)
