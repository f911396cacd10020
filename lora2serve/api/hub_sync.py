"""Versions of a registry on the Hub: each as a tag, each alias as a branch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lora2serve import hub
from lora2serve.api.locate import find_run
from lora2serve.api.registry_sync import HUB, Changes, Synced, unfit, unset_aliases
from lora2serve.hub import refs
from lora2serve.hub.hub_client import refuse_id
from lora2serve.hub.refs import RepositoryRefs
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import Version

MAIN = "main"  # the branch that pushes go to


def sync(registry: Registry, name: str, repo_id: str, progress: Progress, changes: Changes) -> Synced:
    """Make a repository of the Hub say what the registry says of one name.

    Version 7 becomes the tag ``v7``, the alias champion a branch of that name; a version that is tagged is not sent
    again. Raises HubError for what the Hub refuses.
    """
    versions = registry.versions(name)
    refuse_id(repo_id, "--to hub:")
    there = refs.read_refs(repo_id, progress)
    pushed, left_out = [], []
    for version in versions:
        if f"v{version.number}" in there.tags:
            continue
        if reason := unfit(version):
            left_out.append(f"{version.reference}: {reason}")
            continue
        changes.make(f"send {version.reference}", partial(_push, registry, version, repo_id, progress))
        pushed.append(version.reference)
    if pushed and not changes.dry_run:
        there = refs.read_refs(repo_id, progress)
    moved = list(_move(registry, name, repo_id, there, pushed, progress, changes))
    return Synced(
        f"{HUB}{repo_id}", tuple(pushed), tuple(moved), tuple(left_out), tuple(changes.lines), changes.dry_run
    )


def _push(registry: Registry, version: Version, repo_id: str, progress: Progress) -> None:
    """The state of the repository becomes that version, and is tagged."""
    paths = [registry.path(f"{version.reference}/{export.name}") for export in version.exports]
    run = find_run(registry.path(version.reference))
    (result,) = hub.push(paths, repo_id=repo_id, single_repo=True, run=run, progress=progress)
    assert result.commit is not None, "only a dry run has none"
    refs.set_tag(repo_id, f"v{version.number}", result.commit, progress)


def _move(
    registry: Registry, name: str, repo_id: str, there: RepositoryRefs, pushed: Sequence[str], progress: Progress,
    changes: Changes,
) -> Iterator[str]:  # fmt: skip
    """The aliases whose branches are elsewhere, and those that are none any more."""
    numbers = {there.tags[tag]: int(tag[1:]) for tag in there.tags if re.fullmatch(r"v\d+", tag)}
    for alias in sorted(unset_aliases(registry, name) & there.branches.keys() - {MAIN}):
        remove = partial(refs.remove_branch, repo_id, alias, progress)
        yield changes.move(name, alias, numbers.get(there.branches[alias]), None, remove)
    for alias, number in registry.aliases(name).items():
        commit, before = there.tags.get(f"v{number}", ""), there.branches.get(alias)
        if alias == MAIN:
            progress.warn(f"{name}@{alias}: not sent: {MAIN} is the branch that versions are pushed to")
        elif (commit or f"{name}@{number}" in pushed) and commit != before:  # in a dry run it has no commit yet
            move = partial(refs.set_branch, repo_id, alias, commit, before, progress)
            yield changes.move(name, alias, numbers.get(before or ""), number, move)
