"""Pull a pushed export back and verify it: what a consumer's CI runs."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora2serve.artifacts.json_record import read_text
from lora2serve.artifacts.manifest import NAME, Manifest
from lora2serve.errors import HubError, InputError
from lora2serve.hub.hub_client import check_id, hub_errors, hub_progress, hub_quiet
from lora2serve.hub.retry import with_retries
from lora2serve.progress import Progress, Silent
from lora2serve.system.small_files import digest


@dataclass(frozen=True)
class VerifiedRepo:
    """A repository whose files are those of its manifest. ``unproven`` says which exports have no proof of parity."""

    repo_id: str
    commit: str
    path: Path
    files: int
    bytes: int
    exports: list[str]
    unproven: dict[str, str]
    unlisted_files: list[str]  # files in the repository that no manifest names


def pull_check(name: str, revision: str | None = None, progress: Progress | None = None) -> VerifiedRepo:
    """Download what the manifest of ``org/name[@revision]`` names and compare every sha256.

    Raises HubError where the repository was not pushed by lora2serve, cannot be had, or differs from its manifest;
    the caller decides about ``unproven``.
    """
    progress = progress or Silent()
    repo_id, _, after = name.partition("@")
    revision = revision or after or None
    check_id(repo_id)
    with hub_quiet():
        manifest, commit = with_retries(partial(_manifest, repo_id, revision), progress, repo_id, reached=False)
        with hub_progress(progress):
            path = with_retries(partial(_download, repo_id, commit, manifest), progress, repo_id)
    problems = _compare(path, manifest, progress)
    if problems:
        raise HubError(
            f"{repo_id}@{revision or commit}: " + "\n".join(problems),
            f"if the copy here is damaged, remove {path} and run again; else push again",
        )
    exports = manifest.each_export()
    return VerifiedRepo(
        repo_id=repo_id,
        commit=commit,
        path=path,
        files=len(manifest.files),
        bytes=manifest.bytes,
        exports=list(exports),
        unproven={name: why for name, export in exports.items() if (why := export.unproven())},
        unlisted_files=with_retries(partial(_unlisted_files, repo_id, commit, manifest), progress, repo_id),
    )


def _manifest(repo_id: str, revision: str | None) -> tuple[Manifest, str]:
    """The manifest, and the commit that it is of."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_errors(repo_id, revision):
        try:
            path = Path(hf_hub_download(repo_id, NAME, revision=revision))
        except RemoteEntryNotFoundError:
            raise HubError(f"{repo_id}: not pushed by lora2serve (no {NAME})") from None
    try:
        manifest = Manifest.from_text(read_text(path), NAME)
    except InputError as error:
        raise HubError(f"{repo_id}: damaged manifest: {'; '.join(error.message.splitlines())}", "push again") from None
    return manifest, path.parent.name


def _download(repo_id: str, commit: str, manifest: Manifest) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, commit):
        exactly = [glob.escape(name) for name in manifest.files]
        return Path(snapshot_download(repo_id, revision=commit, allow_patterns=exactly))


def _compare(path: Path, manifest: Manifest, progress: Progress) -> list[str]:
    problems = []
    with progress.track("verify", manifest.bytes, "bytes") as advance:
        for name, expected in manifest.files.items():
            if not (path / name).is_file():
                problems.append(f"{name}: missing")
                continue
            actual = digest(path / name)
            if actual != {"sha256": expected.sha256, "size": expected.size}:
                problems.append(f"{name}: {actual['size']} bytes with another sha256, expected {expected.size} bytes")
            advance(expected.size)
    return problems


def _unlisted_files(repo_id: str, commit: str, manifest: Manifest) -> list[str]:
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return []
    with hub_errors(repo_id, commit):
        present = HfApi().list_repo_files(repo_id, revision=commit)
    return sorted(set(present) - set(manifest.files) - {NAME, "README.md", ".gitattributes"})
