"""Versions of a registry on the Hub: each as a tag, each alias as a branch; one way, and again as often as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora2serve import hub
from lora2serve.api.locate import find_run
from lora2serve.errors import UsageError
from lora2serve.hub import refs
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import Version

HUB = "hub:"
MAIN = "main"  # the branch that pushes go to


@dataclass(frozen=True)
class Synced:
    """What was sent: versions that were pushed and aliases that were moved; those left out, each with why."""

    repo_id: str
    pushed: tuple[str, ...]
    moved: tuple[str, ...]
    left_out: tuple[str, ...]


def sync(registry: Registry, name: str, to: str, progress: Progress) -> Synced:
    """Make a repository of the Hub say what the registry says of one name.

    Version 7 becomes the tag ``v7``, the alias champion a branch of that name; a version that is tagged is not sent
    again. Raises UsageError for what cannot be, HubError for what the Hub refuses.
    """
    repo_id = to.removeprefix(HUB)
    if not to.startswith(HUB) or not repo_id:
        raise UsageError(f"--to {to}: unknown kind of place", "expected hub:USER/NAME")
    versions = registry.versions(name)
    before = refs.read_refs(repo_id, progress)
    pushed, left_out = [], []
    for version in versions:
        if f"v{version.number}" in before.tags:
            continue
        if reason := _unfit(version):
            left_out.append(f"{version.reference}: {reason}")
            continue
        _push(registry, version, repo_id, progress)
        pushed.append(version.reference)
    return Synced(repo_id, tuple(pushed), tuple(_move(registry, name, repo_id, progress)), tuple(left_out))


def _push(registry: Registry, version: Version, repo_id: str, progress: Progress) -> None:
    """The state of the repository becomes that version, and is tagged."""
    paths = [registry.path(f"{version.reference}/{export.name}") for export in version.exports]
    run = find_run(registry.path(version.reference))
    (result,) = hub.push(paths, repo_id=repo_id, single_repo=True, run=run, progress=progress)
    assert result.commit is not None, "only a dry run has none"
    refs.set_tag(repo_id, f"v{version.number}", result.commit, progress)


def _move(registry: Registry, name: str, repo_id: str, progress: Progress) -> list[str]:
    """The aliases whose branches were elsewhere."""
    there, moved = refs.read_refs(repo_id, progress), []
    for alias, number in registry.aliases(name).items():
        commit, before = there.tags.get(f"v{number}"), there.branches.get(alias)
        if alias == MAIN:
            progress.warn(f"{name}@{alias}: not sent: {MAIN} is the branch that versions are pushed to")
        elif commit and commit != before:
            refs.set_branch(repo_id, alias, commit, before, progress)
            moved.append(f"{name}@{alias}")
    return moved


def _unfit(version: Version) -> str:
    if version.state == "collected":
        return "its files were removed"
    if not version.exports:
        return "has no exports"
    return next((f"{export.name}: {export.unproven}" for export in version.exports if export.unproven), "")
