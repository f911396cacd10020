"""What a push without names takes: every export of a run that can stand beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lora2serve.artifacts.export_dir import Export
from lora2serve.hub.card_data import GGUF, kind_of
from lora2serve.progress import Progress

BEFORE = ("ollama", "gguf", "lmstudio")  # of files that differ, Ollama's: other engines read its template as well


def choose(exports: Sequence[Path], progress: Progress) -> list[Path]:
    """``exports`` without those whose GGUF has the name of another's and other contents.

    That is so where Ollama needs a comment in the chat template: two files of one type, and one name for it
    (``hf.co/user/name:Q4_K_M``), cannot share a repository.
    """
    opened = [export for export in map(Export.open, exports) if kind_of(export.manifest) == GGUF]
    taken: dict[str, tuple[str, Path]] = {}
    left_out: set[Path] = set()
    for export in sorted(opened, key=lambda export: BEFORE.index(export.target)):
        files = _gguf_files(export)
        other = next((taken[name][1] for name, sha in files.items() if name in taken and taken[name][0] != sha), None)
        if other:
            left_out.add(export.path)
            progress.note(f"{export.path}: not pushed: its GGUF differs from that of {other}, which is")
        else:
            taken |= {name: (sha, export.path) for name, sha in files.items()}
    return [path for path in exports if path not in left_out]


def _gguf_files(export: Export) -> dict[str, str]:
    """Name -> sha256."""
    files = export.manifest.files
    return {PurePosixPath(name).name: entry.sha256 for name, entry in files.items() if name.endswith(".gguf")}
