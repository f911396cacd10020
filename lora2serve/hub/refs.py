"""Tags and branches of a repository on the Hub: which there are, and how one is set to a commit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from lora2serve.hub.hub_client import ASKING, PUSHING, hub_errors
from lora2serve.hub.retry import with_retries
from lora2serve.progress import Progress


@dataclass(frozen=True)
class RepositoryRefs:
    """Names of tags and branches, each with its commit; empty for a repository that is not there."""

    tags: Mapping[str, str] = field(default_factory=dict)
    branches: Mapping[str, str] = field(default_factory=dict)


def read_refs(repo_id: str, progress: Progress) -> RepositoryRefs:
    """Those of a repository; HubError where the Hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def ask() -> RepositoryRefs:
        try:
            refs = HfApi().list_repo_refs(repo_id)
        except RepositoryNotFoundError:
            return RepositoryRefs()
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        return RepositoryRefs(tags, {ref.name: ref.target_commit for ref in refs.branches})

    with hub_errors(repo_id, doing=ASKING):
        return with_retries(ask, progress, repo_id)


def set_tag(repo_id: str, tag: str, commit: str, progress: Progress) -> None:
    """A new tag at a commit; nothing where it is there."""
    from huggingface_hub import HfApi

    with hub_errors(repo_id, tag, PUSHING):
        create = partial(HfApi().create_tag, repo_id, tag=tag, revision=commit, exist_ok=True)
        with_retries(create, progress, repo_id)


def set_branch(repo_id: str, branch: str, commit: str, before: str | None, progress: Progress) -> None:
    """A branch at a commit. The Hub moves none: one that is elsewhere is removed, and made again."""
    from huggingface_hub import HfApi

    if before is not None:
        remove_branch(repo_id, branch, progress)
    with hub_errors(repo_id, branch, PUSHING):
        create = partial(HfApi().create_branch, repo_id, branch=branch, revision=commit, exist_ok=True)
        with_retries(create, progress, repo_id)


def remove_branch(repo_id: str, branch: str, progress: Progress) -> None:
    """Remove a branch; nothing where it is not there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    def remove() -> None:
        with suppress(RevisionNotFoundError):  # an answer that was lost on its way
            HfApi().delete_branch(repo_id, branch=branch)

    with hub_errors(repo_id, branch, PUSHING):
        with_retries(remove, progress, repo_id)
