"""Where a registry is: a folder with a sqlite file in it, or a Postgres by its URL."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lora2serve.errors import UsageError
from lora2serve.system.http import without_credentials
from lora2serve.system.small_files import plain_path

VARIABLE = "LORA2SERVE_REGISTRY"
FOLDER = Path("registry")
FILE = "registry.db"
MOUNTS = Path("/proc/self/mountinfo")
# Locks of these do not hold between machines, or the shared memory of sqlite's journal does not.
SHARED = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "gfs2",
    "ocfs2", "davfs", "vboxsf", "virtiofs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse",
    "fuse.rclone", "fuse.juicefs", "fuse.davfs2",
)  # fmt: skip


@dataclass(frozen=True)
class Location:
    """Of a sqlite registry its folder; of a Postgres its address, as SQLAlchemy has it."""

    folder: Path | None
    url: str

    @property
    def shown(self) -> str:
        """For people: without a password."""
        return str(self.folder) if self.folder else without_credentials(self.url.replace("+psycopg", "", 1))

    @property
    def file(self) -> Path:
        """The sqlite file."""
        assert self.folder is not None
        return self.folder / FILE


def find_location(name: str | Path | None = None) -> Location:
    """What was named, else LORA2SERVE_REGISTRY, else ``registry`` here; UsageError for what cannot be one."""
    text = str(name) if name is not None else os.environ.get(VARIABLE) or str(FOLDER)
    if "://" not in text:
        folder = plain_path(Path(text).expanduser()).absolute()
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: a file, expected the folder of a registry", f"the file {FILE} lies in it")
        return Location(folder, "")
    scheme, _, rest = text.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg") or not _database_of(text):
        raise UsageError(
            f"registry {without_credentials(text)}: expected a folder or postgresql://HOST/DATABASE",
            f"unset {VARIABLE} for the folder {FOLDER}/ here",
        )
    return Location(None, f"postgresql+psycopg://{rest}")


def _database_of(url: str) -> str:
    """The name of its database; empty where there is none, or the host or the port cannot be."""
    try:
        parts = urlsplit(url)
        return parts.path.strip("/") if parts.port != 0 else ""
    except ValueError:
        return ""


def refuse_shared(folder: Path) -> None:
    """UsageError where the folder lies on a file system of several machines: sqlite's journal is not safe there."""
    kind = file_system(folder, MOUNTS.read_text(encoding="utf-8", errors="replace") if MOUNTS.is_file() else "")
    if kind in SHARED:
        raise UsageError(
            f"{folder}: on a network file system ({kind}), where sqlite can lose what two machines write",
            f"{VARIABLE}=postgresql://HOST/DATABASE is for several machines; or a folder on a disk of this one",
        )


def file_system(folder: Path, mounts: str) -> str:
    """The type of the file system that a folder is or will be on, by the lines of mountinfo; empty if unknown."""
    there = next(path for path in (folder, *folder.parents) if path.exists()).resolve()
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split(" ")
        if len(words) < 5 or not rest:
            continue
        point = Path(words[4].encode().decode("unicode_escape"))
        if there.is_relative_to(point) and len(point.parts) >= best:  # the last of two on one point lies above
            best, kind = len(point.parts), rest.split(" ")[0]
    return kind
