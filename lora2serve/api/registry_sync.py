"""Versions of a registry in other places: one way, and again as often as wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from lora2serve.errors import UsageError, did_you_mean
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import Version

R = TypeVar("R")
HUB, MLFLOW = "hub:", "mlflow:"


@dataclass(frozen=True)
class Synced:
    """What was sent: new versions, aliases that were moved or removed; and the versions left out, each with why.

    ``changes`` are all of them in words, what is new of versions there already, too. Of a dry run, what would be sent.
    """

    to: str
    pushed: tuple[str, ...]
    moved: tuple[str, ...]
    left_out: tuple[str, ...]
    changes: tuple[str, ...]
    dry_run: bool


@dataclass
class Changes:
    """What is written elsewhere, a line each; of a dry run nothing is written."""

    dry_run: bool
    lines: list[str] = field(default_factory=list)

    def make(self, line: str, write: Callable[[], R]) -> R | None:
        """Write it, and what that returns; None in a dry run."""
        done = None if self.dry_run else write()
        self.lines.append(line)
        return done

    def move(self, name: str, alias: str, old: int | None, new: int | None, write: Callable[[], object]) -> str:
        """An alias from one version to another; its name."""
        self.make(f"move {name}@{alias} {old or '-'} -> {new or '-'}", write)
        return f"{name}@{alias}"


def sync(registry: Registry, name: str, to: str, progress: Progress, *, dry_run: bool = False) -> Synced:
    """Make another place say what the registry says of one name; UsageError for a place of an unknown kind."""
    from lora2serve.api import hub_sync, mlflow_sync

    for kind, send in ((HUB, hub_sync.sync), (MLFLOW, mlflow_sync.sync)):
        if to.startswith(kind) and to != kind:
            return send(registry, name, to.removeprefix(kind), progress, Changes(dry_run))
    kind = f"{to.partition(':')[0]}:"
    near = did_you_mean(kind, (HUB, MLFLOW)) if kind not in (HUB, MLFLOW) else ""
    raise UsageError(f"--to {to}: unknown kind of place{near}", "expected hub:USER/NAME or mlflow:http://HOST:PORT")


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
