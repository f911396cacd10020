"""What a push without names takes: every export of a run that can stand beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lora2serve.artifacts import manifest
from lora2serve.hub.card_data import GGUF, kind_of
from lora2serve.progress import Progress

BEFORE = ("ollama", "gguf", "lmstudio")  # of files that differ, Ollama's: other engines read its template as well


def choose(exports: Sequence[Path], progress: Progress) -> list[Path]:
    """``exports`` without those whose GGUF has the name of another's and other contents.

    That is so where Ollama needs a comment in the chat template: two files of one type, and one name for it
    (``hf.co/user/name:Q4_K_M``), cannot share a repository.
    """
    abouts = {path: manifest.read(path) for path in exports}
    files = {path: _files(about["files"]) for path, about in abouts.items() if kind_of(about) == GGUF}
    order = sorted(files, key=lambda path: BEFORE.index(str(abouts[path]["target"])))
    taken: dict[str, tuple[str, Path]] = {}
    left: set[Path] = set()
    for path in order:
        found = files[path]
        other = next((taken[name][1] for name, sha in found.items() if name in taken and taken[name][0] != sha), None)
        if other:
            left.add(path)
            progress.note(f"{path}: stays here, its GGUF differs from that of {other}, which goes up")
        else:
            taken |= {name: (sha, path) for name, sha in found.items()}
    return [path for path in exports if path not in left]


def _files(listed: dict[str, dict[str, str]]) -> dict[str, str]:
    return {PurePosixPath(name).name: entry["sha256"] for name, entry in listed.items() if name.endswith(".gguf")}
