"""From a name to a local directory: a path as it is, or ``org/name[@revision]`` through huggingface_hub's cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora2serve.errors import HubError, InputError, did_you_mean
from lora2serve.hub.hub_client import check_id, hub_errors, hub_progress
from lora2serve.hub.retry import with_retries
from lora2serve.progress import Progress, Silent

# What a model or adapter needs to be read. Nothing that runs: no .py, no pickle.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "README.md"]
# The same weights once more for other programs (Mistral's consolidated, onnx/, checkpoints of the training).
UNWANTED = ["consolidated*", "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]
PICKLE = ["adapter_model.bin"]


@dataclass(frozen=True)
class FetchedDir:
    """A local directory, and where it came from: ``commit`` is None for a path that was there."""

    path: Path
    commit: str | None
    id: str


def fetch(
    name: str, revision: str | None = None, *, pickle: bool = False, weights: bool = True,
    progress: Progress | None = None,
) -> FetchedDir:  # fmt: skip
    """The directory that ``name`` means: a local path, or ``org/name[@revision]`` of the Hub or its cache.

    ``pickle`` also brings an ``adapter_model.bin``; without ``weights`` only the small files come. Raises InputError
    for a path that is not there, HubError for whatever keeps the Hub from giving it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return FetchedDir(path, None, name)
    refuse_missing_path(name)
    repo_id, at_revision = _split(name)
    revision = revision or at_revision
    try:
        return _download(repo_id, revision, _wanted(pickle, weights), progress or Silent())
    except HubError as error:
        raise HubError(_also_not_local(name, error.message), error.hint) from None


def pin_data(name: str) -> tuple[str, str]:
    """``org/name[@revision]`` of a data set as its id and commit, from the cache where the Hub is not to be had.

    Raises like ``fetch``.
    """
    from huggingface_hub import HfApi

    refuse_missing_path(name)
    repo_id, revision = _split(name)

    def resolve() -> str:
        return HfApi().resolve_revision(repo_id, repo_type="dataset", revision=revision).resolved

    try:
        with hub_errors(repo_id, revision, kind="dataset"):
            return repo_id, with_retries(resolve, Silent(), repo_id, reached=False)
    except HubError as error:
        raise HubError(_also_not_local(name, error.message), error.hint) from None


def _split(name: str) -> tuple[str, str | None]:
    """``org/name[@revision]``, checked."""
    repo_id, at, revision = name.partition("@")
    if at and not revision:
        raise InputError(f"{name}: no revision after '@'", f"{repo_id}@main, or without '@'")
    check_id(repo_id)
    return repo_id, revision or None


def _wanted(pickle: bool, weights: bool) -> list[str]:
    chosen = WANTED + (PICKLE if pickle else [])
    return chosen if weights else [pattern for pattern in chosen if "safetensors" not in pattern]


def _download(repo_id: str, revision: str | None, wanted: list[str], progress: Progress) -> FetchedDir:
    from huggingface_hub import snapshot_download

    def download() -> str:
        return str(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))

    with hub_errors(repo_id, revision), hub_progress(progress):
        path = Path(with_retries(download, progress, repo_id, reached=False))
    return FetchedDir(path, path.name, repo_id)


def refuse_missing_path(name: str) -> None:
    """InputError for a name that can only be a path; ``a/b`` may be either, unless ``a`` is ``runs``."""
    parent = Path(name).expanduser().parent
    in_runs = name.startswith("runs/")
    if not (in_runs or name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name or name.count("/") > 1):
        return
    where = _near(name) if parent.is_dir() else f" (there is no {parent} either)"
    kind, hint = ("run or directory", "`lora2serve train` makes one") if in_runs else ("directory", "")
    raise InputError(f"{name}: no such {kind}{where}", hint or "or name a Hub id: org/name")


def _also_not_local(name: str, message: str) -> str:
    """The Hub's error for a name that could as well be a mistyped path, said first where its parent exists."""
    if "/" in name and Path(name).parent.is_dir():
        return f"{name}: no such directory{_near(name)}; as a Hub id: {message}"
    return message if "@" in name else f"{message}; nor is there a local directory {name}"


def _near(name: str) -> str:
    path = Path(name).expanduser()
    return did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
