"""Versions of a registry in other places: one way, and again as often as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora2serve.errors import UsageError
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import Version

HUB, MLFLOW = "hub:", "mlflow:"


@dataclass(frozen=True)
class Synced:
    """What was sent: new versions, aliases that were moved or removed; and the versions left out, each with why."""

    to: str
    pushed: tuple[str, ...]
    moved: tuple[str, ...]
    left_out: tuple[str, ...]


def sync(registry: Registry, name: str, to: str, progress: Progress) -> Synced:
    """Make another place say what the registry says of one name; UsageError for a place of an unknown kind."""
    from lora2serve.api import hub_sync, mlflow_sync

    for kind, send in ((HUB, hub_sync.sync), (MLFLOW, mlflow_sync.sync)):
        if to.startswith(kind) and to != kind:
            return send(registry, name, to.removeprefix(kind), progress)
    raise UsageError(f"--to {to}: unknown kind of place", "expected hub:USER/NAME or mlflow:http://HOST:PORT")


def unset_aliases(registry: Registry, name: str) -> set[str]:
    """Aliases that a name had, and has no longer."""
    return {event.alias for event in registry.history(name) if event.alias} - registry.aliases(name).keys()


def unfit(version: Version) -> str:
    """Why a version is not sent; empty for one whose files are there and whose parity is met."""
    if version.state == "collected":
        return "its files were removed"
    if not version.exports:
        return "has no exports"
    return next((f"{export.name}: {export.unproven}" for export in version.exports if export.unproven), "")
