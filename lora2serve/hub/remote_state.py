"""What a repository holds now, and what must change for it to hold what we want."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.manifest import NAME, Manifest
from lora2serve.errors import InputError
from lora2serve.hub.package import UploadItem

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Remote:
    """One revision of a repository: ``files`` maps a path to (oid, size), the oid being the sha256 of a large file
    and the git sha1 of a small one. ``head`` is None where there is no such repository or branch yet."""

    head: str | None = None
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    private: bool = False
    exists: bool = False

    def has(self, item: UploadItem) -> bool:
        """Whether the repository holds exactly this file."""
        oid, size = self.files.get(item.path, ("", -1))
        return size == item.size and oid in (item.sha256, item.git)


@dataclass(frozen=True)
class RemoteChange:
    """What one push does to a repository."""

    add: list[UploadItem]
    delete: list[str]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


def fetch_state(api: HfApi, repo_id: str, revision: str) -> Remote:
    """The repository at the head of ``revision``, as one consistent state."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return Remote(exists=True, private=bool(api.model_info(repo_id).private))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Remote()
    entries = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {
        entry.path: (entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.size)
        for entry in entries
        if isinstance(entry, RepoFile)
    }
    return Remote(info.sha, files, bool(info.private), exists=True)


def read_text(api: HfApi, repo_id: str, remote: Remote, path: str) -> str | None:
    """A small text file of that state, or None where there is none."""
    if path not in remote.files:
        return None
    return Path(api.hf_hub_download(repo_id, path, revision=remote.head)).read_text(encoding="utf-8-sig")


def old_exports(api: HfApi, repo_id: str, remote: Remote) -> list[Manifest]:
    """The manifests of the exports that the repository holds already; empty where it was not made by us.

    One that was damaged there counts as none: the push puts it right.
    """
    text = read_text(api, repo_id, remote, NAME)
    try:
        return list(Manifest.from_text(text, NAME).each_export().values()) if text else []
    except InputError:
        return []


def change(remote: Remote, items: Iterable[UploadItem], obsolete: Iterable[str]) -> RemoteChange:
    """What is missing there, and what of the ``obsolete`` paths is still there."""
    every = list(items)
    names = {item.path for item in every}
    return RemoteChange(
        [item for item in every if not remote.has(item)],
        sorted(path for path in set(obsolete) - names if path in remote.files),
    )
