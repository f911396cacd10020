"""From a name to a local directory: a path as it is, or ``org/name[@revision]`` through huggingface_hub's cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora2serve.errors import HubError, InputError, did_you_mean
from lora2serve.hub.client import check_id, translated

# What a model or adapter needs to be read. Nothing that runs: no .py, no pickle.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "README.md"]
# The same weights once more for other programs (Mistral's consolidated, onnx/, checkpoints of the training).
UNWANTED = ["consolidated*", "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]
PICKLE = ["adapter_model.bin"]


@dataclass(frozen=True)
class Fetched:
    """A local directory, and where it came from: ``commit`` is None for a path that was there."""

    path: Path
    commit: str | None
    id: str


def fetch(name: str, revision: str | None = None, *, pickle: bool = False) -> Fetched:
    """The directory that ``name`` means: a local path, or ``org/name[@revision]`` of the Hub or its cache.

    ``pickle`` also brings an ``adapter_model.bin``. Raises InputError for a path that is not there, HubError
    for whatever keeps the Hub from giving it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return Fetched(path, None, name)
    _refuse_missing_path(name)
    repo_id, at, after = name.partition("@")
    revision = revision or after or None
    if at and not revision:
        raise InputError(f"{name}: no revision after '@'", f"{repo_id}@main, or without '@'")
    check_id(repo_id)
    try:
        return _download(repo_id, revision, pickle)
    except HubError as error:
        raise HubError(_also_not_local(name, error.message), error.hint) from None


def _download(repo_id: str, revision: str | None, pickle: bool) -> Fetched:
    from huggingface_hub import snapshot_download

    with translated(repo_id, revision):
        path = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=WANTED + (PICKLE if pickle else []),
                ignore_patterns=UNWANTED,
            )
        )
    return Fetched(path, path.name, repo_id)


def _refuse_missing_path(name: str) -> None:
    """An error for a name that can only be a path; ``a/b`` may be either."""
    parent = Path(name).expanduser().parent
    if not (name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name or name.count("/") > 1):
        return
    where = _near(name) if parent.is_dir() else f" (there is no {parent} either)"
    raise InputError(f"{name}: no such directory{where}", "or name a Hub id: org/name")


def _also_not_local(name: str, message: str) -> str:
    """The Hub's error for a name that could as well be a mistyped path, said first where its parent exists."""
    if "/" in name and Path(name).parent.is_dir():
        return f"{name}: no such directory{_near(name)}; as a Hub id: {message}"
    return message if "@" in name else f"{message}; nor is there a local directory {name}"


def _near(name: str) -> str:
    path = Path(name).expanduser()
    return did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
