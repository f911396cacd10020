"""A version as a directory that every command reads: a run, an adapter or an export; hard links where that can be.

It can be made again at any time; what else is written into it is no part of the version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, select

from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.run import RECORD
from lora2serve.artifacts.version_marker import is_of_version, write_marker
from lora2serve.errors import RegistryError, UsageError, did_you_mean
from lora2serve.registry.content_store import Blob, ContentStore, staged
from lora2serve.registry.ledger import LATER
from lora2serve.registry.tables import exports, files
from lora2serve.registry.version_record import Version
from lora2serve.registry.version_source import ADAPTER, EXPORTS
from lora2serve.system.small_files import digest


@dataclass(frozen=True)
class VersionFiles:
    """The files of a version, and the manifests of its exports by their label."""

    blobs: Mapping[str, Blob]
    manifests: Mapping[str, str]

    def of(self, label: str) -> dict[str, Blob]:
        """Those of one export, by their path in it."""
        prefix = f"{EXPORTS}/{label}/"
        return {path.removeprefix(prefix): blob for path, blob in self.blobs.items() if path.startswith(prefix)}

    def own(self, version: Version) -> dict[str, Blob]:
        """Those outside exports by their path in the directory; an adapter without a run has the version's name."""
        paths = (path for path in self.blobs if not path.startswith(f"{EXPORTS}/"))
        if RECORD in self.blobs:
            return {path: self.blobs[path] for path in paths}
        return {f"{version.folder}/{path.removeprefix(ADAPTER).lstrip('/')}": self.blobs[path] for path in paths}


def read_files(connection: Connection, version: Version) -> VersionFiles:
    """What is to be made; UsageError where the files were removed."""
    if version.state == "collected":
        raise UsageError(
            f"{version.reference}: its files were removed by `lora2serve registry gc`",
            "`lora2serve registry add` of the same run brings them back" if version.run else "add it again",
        )
    own = (files.c.name == version.name, files.c.number == version.number)
    rows = connection.execute(select(files.c.path, files.c.sha256, files.c.size).where(*own))
    blobs = {row.path: Blob(row.sha256, row.size) for row in rows}
    labels = connection.execute(
        select(exports.c.label, exports.c.manifest).where(
            exports.c.name == version.name, exports.c.number == version.number
        )
    )
    return VersionFiles(blobs, {row.label: row.manifest for row in labels})


def check_out(views: Path, store: ContentStore, version: Version, content: VersionFiles, labels: Sequence[str]) -> Path:
    """The directory of a version below ``views``, with those of its exports; what is missing in it is made."""
    target, own = views / version.folder, content.own(version)
    if not is_of_version(target):
        _make(views, store, target, own, version)
    for path, blob in own.items():
        if not _is_there(target / path, blob, measured=path.startswith(LATER)):
            _replace(views, store, target / path, blob, link=not path.startswith(LATER))
    for label in labels:
        _make_export(views, store, target / EXPORTS / label, content.of(label), content.manifests[label])
    return target


def choose_labels(version: Version, requested: str) -> list[str]:
    """The exports that are meant: the one that was named, or all; UsageError for one that is not there."""
    labels = [export.name for export in version.exports]
    if not requested:
        return labels
    if requested not in labels:
        hint = f"it has: {', '.join(labels)}" if labels else "it has no exports"
        raise UsageError(f"{version.reference}/{requested}: no such export{did_you_mean(requested, labels)}", hint)
    return [requested]


def path_of(target: Path, version: Version, requested: str) -> Path:
    """What a command is given: the export that was named, the run, the adapter, or the one export."""
    if requested:
        return target / EXPORTS / requested
    if (target / RECORD).is_file():
        return target
    if (target / version.folder).is_dir():
        return target / version.folder
    return target / EXPORTS / version.exports[0].name


def _make(views: Path, store: ContentStore, target: Path, blobs: Mapping[str, Blob], version: Version) -> None:
    with staged(views) as folder:
        new = folder / target.name
        new.mkdir()
        for path, blob in blobs.items():
            store.get(blob, new / path, link=not path.startswith(LATER))
        write_marker(new, version.name, version.number, version.sha256)
        if target.exists() and not is_of_version(target):
            raise RegistryError(f"{target}: exists, and is not the directory of a version", "move it away")
        with suppress(OSError):  # another process was faster
            os.rename(new, target)


def _make_export(views: Path, store: ContentStore, target: Path, blobs: Mapping[str, Blob], manifest: str) -> None:
    whole = (target / MANIFEST).is_file() and all(_is_there(target / path, blob) for path, blob in blobs.items())
    if not whole:
        with staged(views) as folder:
            new = folder / target.name
            new.mkdir()
            for path, blob in blobs.items():
                store.get(blob, new / path)
            Manifest.from_text(manifest, "manifest").write(new)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                os.rename(target, folder / "old")
            with suppress(OSError):  # another process was faster
                os.rename(new, target)
    elif (target / MANIFEST).read_text(encoding="utf-8") != manifest:
        Manifest.from_text(manifest, "manifest").write(target)


def _replace(views: Path, store: ContentStore, target: Path, blob: Blob, *, link: bool) -> None:
    with staged(views) as folder:
        store.get(blob, folder / "file", link=link)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "file", target)


def _is_there(path: Path, blob: Blob, *, measured: bool = False) -> bool:
    """By its size; what may have been measured again by its content."""
    if not path.is_file() or path.stat().st_size != blob.size:
        return False
    return not measured or digest(path)["sha256"] == blob.sha256
