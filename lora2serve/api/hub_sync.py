"""Versions of a registry on the Hub: each as a tag, each alias as a branch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora2serve import hub
from lora2serve.api.locate import find_run
from lora2serve.api.registry_sync import HUB, Synced, unfit, unset_aliases
from lora2serve.hub import refs
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import Version

MAIN = "main"  # the branch that pushes go to


def sync(registry: Registry, name: str, repo_id: str, progress: Progress) -> Synced:
    """Make a repository of the Hub say what the registry says of one name.

    Version 7 becomes the tag ``v7``, the alias champion a branch of that name; a version that is tagged is not sent
    again. Raises HubError for what the Hub refuses.
    """
    versions = registry.versions(name)
    before = refs.read_refs(repo_id, progress)
    pushed, left_out = [], []
    for version in versions:
        if f"v{version.number}" in before.tags:
            continue
        if reason := unfit(version):
            left_out.append(f"{version.reference}: {reason}")
            continue
        _push(registry, version, repo_id, progress)
        pushed.append(version.reference)
    moved = _move(registry, name, repo_id, progress)
    return Synced(f"{HUB}{repo_id}", tuple(pushed), tuple(moved), tuple(left_out))


def _push(registry: Registry, version: Version, repo_id: str, progress: Progress) -> None:
    """The state of the repository becomes that version, and is tagged."""
    paths = [registry.path(f"{version.reference}/{export.name}") for export in version.exports]
    run = find_run(registry.path(version.reference))
    (result,) = hub.push(paths, repo_id=repo_id, single_repo=True, run=run, progress=progress)
    assert result.commit is not None, "only a dry run has none"
    refs.set_tag(repo_id, f"v{version.number}", result.commit, progress)


def _move(registry: Registry, name: str, repo_id: str, progress: Progress) -> list[str]:
    """The aliases whose branches were elsewhere, and those that are none any more."""
    there, moved = refs.read_refs(repo_id, progress), []
    for alias in sorted(unset_aliases(registry, name) & there.branches.keys() - {MAIN}):
        refs.remove_branch(repo_id, alias, progress)
        moved.append(f"{name}@{alias}")
    for alias, number in registry.aliases(name).items():
        commit, before = there.tags.get(f"v{number}"), there.branches.get(alias)
        if alias == MAIN:
            progress.warn(f"{name}@{alias}: not sent: {MAIN} is the branch that versions are pushed to")
        elif commit and commit != before:
            refs.set_branch(repo_id, alias, commit, before, progress)
            moved.append(f"{name}@{alias}")
    return moved
