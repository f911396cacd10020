"""LM Studio's own folder of models: where it is, and an export installed there, completely or not at all.

The folders are those of lmstudio-ai/lms, ``src/modelsFolder.ts`` and the older ``src/subcommands/importCmd.ts``.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import ExportError, InputError
from lora2serve.progress import Progress
from lora2serve.system import scratch

COPY_BYTES = 4 << 20  # bytes copied at once


def models_folder() -> Path:
    """``downloadsFolder`` of its settings.json, or ``models`` in its home."""
    home = _home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for settings in (home / "settings.json", config / "LM Studio" / "settings.json"):
        if settings.is_file():
            try:
                folder = json.loads(settings.read_text(encoding="utf-8")).get("downloadsFolder")
            except (ValueError, AttributeError) as error:
                raise InputError(f"{settings}: {error}", "start LM Studio once, or leave --install out") from None
            if isinstance(folder, str) and folder:
                return Path(folder).expanduser()
    return home / "models"


def install(export: Path, folder: Path, progress: Progress, *, overwrite: bool = False) -> list[Path]:
    """Every GGUF of the export at ``folder/publisher/model/``: linked where that is possible, else copied."""
    names = [name for name in Manifest.read(export).files if name.endswith(".gguf")]
    targets = [folder / name for name in names]
    refuse_existing(targets, overwrite)
    mark = f"partial-{uuid.uuid4().hex[:8]}"
    partials = [target.with_name(f".{target.name}.{mark}") for target in targets]
    try:
        with ExitStack() as stack:
            for name, partial in zip(names, partials, strict=True):
                stack.enter_context(scratch.filled(partial.parent))
                stack.enter_context(scratch.claimed(partial))
                _link_or_copy(export / name, partial, progress)
            _publish(partials, targets, mark, overwrite)
    except OSError as error:
        raise ExportError(
            f"{error.filename or folder}: {error.strerror}", f"the export is kept: {export}; nothing was installed"
        ) from error
    return targets


def refuse_existing(targets: Sequence[Path], overwrite: bool) -> None:
    """ExportError where LM Studio has such a file."""
    existing = [target for target in targets if os.path.lexists(target)]
    if existing and not overwrite:
        raise ExportError(f"{existing[0]}: LM Studio has that file", "--overwrite replaces it, or give another --name")


def _home() -> Path:
    pointer = Path.home() / ".lmstudio-home-pointer"
    if pointer.is_file():
        return Path(pointer.read_text(encoding="utf-8").strip())
    older = Path.home() / ".cache" / "lm-studio"
    return older if older.is_dir() else Path.home() / ".lmstudio"


def _link_or_copy(source: Path, partial: Path, progress: Progress) -> None:
    """A second name for the file, or on another file system a copy."""
    with suppress(OSError):
        os.link(source, partial)
        return
    with (
        source.open("rb") as read,
        partial.open("xb") as write,
        progress.track(f"copy {source.name}", source.stat().st_size, "bytes") as advance,
    ):
        while block := read.read(COPY_BYTES):
            write.write(block)
            advance(len(block))
        write.flush()
        os.fsync(write.fileno())


def _publish(partials: Sequence[Path], targets: Sequence[Path], mark: str, overwrite: bool) -> None:
    """All files under their names, one rename after the other; the old files come back if one of them fails."""
    aside: dict[Path, Path] = {}
    published: list[Path] = []
    try:
        for partial, target in zip(partials, targets, strict=True):
            if overwrite and os.path.lexists(target):
                aside[target] = target.with_name(f".{target.name}.{mark}-old")
                os.rename(target, aside[target])
            _rename_new(partial, target)
            published.append(target)
    except BaseException:
        for target in published:
            target.unlink()
        for target, old in aside.items():
            if not os.path.lexists(target):
                os.rename(old, target)
        raise
    for old in aside.values():
        old.unlink()


def _rename_new(partial: Path, target: Path) -> None:
    """Rename, but never onto a file that appeared meanwhile."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(17, "File exists", str(target)) from None
        os.rename(partial, target)
