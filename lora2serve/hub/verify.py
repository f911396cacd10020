"""Pull a pushed export back and verify it: what a consumer's CI runs."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora2serve.artifacts import manifest
from lora2serve.errors import HubError
from lora2serve.hub.card_data import unproven
from lora2serve.hub.hub_client import check_id, hub_errors, hub_progress, hub_quiet
from lora2serve.hub.retry import with_retries
from lora2serve.progress import Progress, Silent
from lora2serve.system.small_files import digest


@dataclass(frozen=True)
class Checked:
    """A repository whose files are those of its manifest. ``unproven`` says which exports have no proof of parity."""

    repo_id: str
    commit: str
    path: Path
    files: int
    bytes: int
    exports: list[str]
    unproven: dict[str, str]
    unlisted_files: list[str]  # files in the repository that no manifest names


def pull_check(name: str, revision: str | None = None, progress: Progress | None = None) -> Checked:
    """Download what the manifest of ``org/name[@revision]`` names and compare every sha256.

    Raises HubError where the repository was not pushed by lora2serve, cannot be had, or differs from its manifest;
    the caller decides about ``unproven``.
    """
    told = progress or Silent()
    repo_id, _, after = name.partition("@")
    revision = revision or after or None
    check_id(repo_id)
    with hub_quiet():
        content, commit = with_retries(partial(_manifest, repo_id, revision), told, repo_id, reached=False)
        with hub_progress(told):
            path = with_retries(partial(_download, repo_id, commit, content), told, repo_id)
    problems = _compare(path, content["files"], told)
    if problems:
        raise HubError(
            f"{repo_id}@{revision or commit}: " + "\n".join(problems),
            f"if the copy here is damaged, remove {path} and run again; else push again",
        )
    exports: dict[str, Any] = content.get("exports") or {str(content.get("target")): content}
    return Checked(
        repo_id=repo_id,
        commit=commit,
        path=path,
        files=len(content["files"]),
        bytes=sum(int(entry["size"]) for entry in content["files"].values()),
        exports=list(exports),
        unproven={export: why for export, told_of in exports.items() if (why := unproven(told_of))},
        unlisted_files=with_retries(partial(_unlisted_files, repo_id, commit, content), told, repo_id),
    )


def _manifest(repo_id: str, revision: str | None) -> tuple[dict[str, Any], str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_errors(repo_id, revision):
        try:
            path = Path(hf_hub_download(repo_id, manifest.NAME, revision=revision))
        except RemoteEntryNotFoundError:
            raise HubError(f"{repo_id}: no {manifest.NAME}, so nothing that lora2serve pushed") from None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != manifest.FORMAT:
            raise HubError(f"{repo_id}: {manifest.NAME} has format {content['format']}, expected {manifest.FORMAT}")
        _names(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(f"{repo_id}: {manifest.NAME} is damaged ({error})", "push again") from None
    return content, path.parent.name


def _names(content: dict[str, Any]) -> None:
    exports = content.get("exports", {})
    if not isinstance(exports, dict) or not all(isinstance(one, dict) for one in exports.values()):
        raise ValueError(f"exports is {str(exports)[:50]!r}, expected a mapping of manifests")
    for name, entry in content["files"].items():
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"names {name!r}, a place outside the repository")
        if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
            raise ValueError(f"no size and sha256 for {name!r}")


def _download(repo_id: str, commit: str, content: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, commit):
        exactly = [glob.escape(name) for name in content["files"]]
        return Path(snapshot_download(repo_id, revision=commit, allow_patterns=exactly))


def _compare(path: Path, files: dict[str, Any], told: Progress) -> list[str]:
    problems = []
    with told.track("verify", sum(int(entry["size"]) for entry in files.values()), "bytes") as advance:
        for name, expected in files.items():
            if not (path / name).is_file():
                problems.append(f"{name}: missing")
                continue
            found = digest(path / name)
            if found != {"sha256": expected["sha256"], "size": expected["size"]}:
                problems.append(f"{name}: {found['size']} bytes with another sha256, expected {expected['size']} bytes")
            advance(int(expected["size"]))
    return problems


def _unlisted_files(repo_id: str, commit: str, content: dict[str, Any]) -> list[str]:
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return []
    with hub_errors(repo_id, commit):
        there = HfApi().list_repo_files(repo_id, revision=commit)
    return sorted(set(there) - set(content["files"]) - {manifest.NAME, "README.md", ".gitattributes"})
