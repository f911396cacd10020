"""Where a directory of huggingface_hub's cache came from, told by its place in the cache: nothing is asked or imported.

The layout is ``models--org--name/snapshots/<commit>``; an id has no ``--`` in it, so the folder's name is unambiguous
(huggingface_hub, docs/source/en/guides/manage-cache.md and ``utils/_validators.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSnapshot:
    """A repository of the Hub at one commit."""

    id: str
    commit: str


def hub_snapshot(path: Path) -> HubSnapshot | None:
    """The repository and commit of a snapshot in the Hub's cache, or None for any other directory."""
    real = path.resolve()
    kind, _, repo = real.parent.parent.name.partition("--")
    if real.parent.name != "snapshots" or kind != "models" or not repo or not _COMMIT.fullmatch(real.name):
        return None
    return HubSnapshot(repo.replace("--", "/"), real.name)


def short_name(path: Path) -> str:
    """What a model or adapter is called: its repository's name, or that of its directory."""
    snapshot = hub_snapshot(path)
    return snapshot.id.rpartition("/")[2] if snapshot else path.resolve().name
