"""An open registry: its database, the store of its files, and the directories that are made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Connection, func, select

from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.run import Run, is_run
from lora2serve.artifacts.version_marker import read_marker
from lora2serve.errors import InputError, RegistryError
from lora2serve.progress import Progress
from lora2serve.registry import checkout, upkeep
from lora2serve.registry.content_store import Blob, FolderStore, open_store
from lora2serve.registry.database import Database, NoRegistry
from lora2serve.registry.ledger import LATER, Labels, Ledger
from lora2serve.registry.live_aliases import last_event
from lora2serve.registry.location import Location
from lora2serve.registry.tables import files, versions
from lora2serve.registry.upkeep import Collected
from lora2serve.registry.version_record import ChangedVersion, Version
from lora2serve.registry.version_reference import VersionReference
from lora2serve.registry.version_rows import find_version, read_events
from lora2serve.registry.version_source import EXPORTS, VersionSource, of_run
from lora2serve.system import scratch
from lora2serve.system.hardware import cache_folder
from lora2serve.system.small_files import digest

VIEWS = "versions"


class OpenRegistry:
    """A registry that is there; ``create`` makes it where it is not, with its files at ``content``."""

    def __init__(self, location: Location, *, create: bool = False, content: str = "") -> None:
        self.location = location
        self.database = Database(location, create=create, content=content)
        place = self.database.content or str(location.folder)
        self.store = open_store(place)
        self.views = _views(location, place)
        self._partial = [self.views, *([self.store.root] if isinstance(self.store, FolderStore) else [])]

    def close(self) -> None:
        """End its connections."""
        self.database.close()

    def reading(self) -> AbstractContextManager[Connection]:
        """One transaction that sees one state."""
        return self.database.reading()

    @contextmanager
    def writing(self, who: str) -> Iterator[Ledger]:
        """One transaction of ``who``: all of it is written at its end, or nothing."""
        with self.database.writing() as connection:
            yield Ledger(connection, who)

    def change(self, who: str, work: Callable[[Ledger], Version], *, dry_run: bool) -> ChangedVersion:
        """One transaction of ``who``, and what it did; of a dry run nothing of it is written."""
        with self.writing(who) as ledger:
            before = last_event(ledger.connection)
            version = work(ledger)
            events = tuple(read_events(ledger.connection, None, before))
            files, gates = tuple(ledger.files), tuple(ledger.gates)
            if dry_run:
                ledger.connection.rollback()
            return ChangedVersion(**vars(version), events=events, files=files, gates=gates, dry_run=dry_run)

    def add(
        self, name: str, source: VersionSource, labels: Labels, who: str, progress: Progress, *, dry_run: bool = False
    ) -> ChangedVersion:
        """The version that the source is; its files are stored before the database names them."""
        with nullcontext() if dry_run else self.database.content_lock(alone=False):
            blobs = self._store_files(source, progress, dry_run=dry_run)
            problems = source.problems({path: blob.sha256 for path, blob in blobs.items()})
            if problems:
                raise InputError("\n".join(problems), "export again, or copy it again")

            def write(ledger: Ledger) -> Version:
                number = ledger.add_version(name, source, blobs, labels)
                self._forget_views_of_mended(ledger.connection)
                return find_version(ledger.connection, VersionReference(name, number))

            return self.change(who, write, dry_run=dry_run)

    def check_out(self, reference: VersionReference) -> tuple[Version, Path]:
        """The directory of a version, with its exports or the one that is named: a run, an adapter or an export."""
        with self.database.content_lock(alone=False):
            with self.reading() as connection:
                version = find_version(connection, reference)
                content = checkout.read_files(connection, version)
            labels = checkout.choose_labels(version, reference.export)
            self.views.mkdir(parents=True, exist_ok=True)
            with _disk_errors():
                target = checkout.check_out(self.views, self.store, version, content, labels)
            return version, checkout.path_of(target, version, reference.export)

    def local_files(self, reference: VersionReference) -> dict[str, Path]:
        """Every file of a version by its path in it, with the manifests of its exports; in its directory here."""
        version, _ = self.check_out(reference)
        with self.reading() as connection:
            content = checkout.read_files(connection, version)
        target = self.views / version.folder
        inside = [path for path in content.blobs if path.startswith(f"{EXPORTS}/")]
        paths = [*content.own(version), *inside, *(f"{EXPORTS}/{label}/{MANIFEST}" for label in content.manifests)]
        return {path: target / path for path in sorted(paths)}

    def record_measured(self, directory: Path, who: str) -> None:
        """Write down what lies in the directory of a version and was not there when it was added."""
        name, number = read_marker(directory)
        source = of_run(Run(directory)) if is_run(directory) else None
        local = {path: file for path, file in source.files().items() if path.startswith(LATER)} if source else {}
        manifests = [Manifest.read(path.parent) for path in directory.glob(f"{EXPORTS}/*/{MANIFEST}")]
        with self.database.content_lock(alone=False), _disk_errors():
            blobs = {path: self.store.put(file, link=False) for path, file in local.items()}
            with self.writing(who) as ledger:
                ledger.add_files(name, number, blobs)
                for manifest in manifests:
                    ledger.set_manifest(name, number, manifest.export_name, manifest.to_text(), manifest.unproven())
                for suite in source.scores() if source else ():
                    ledger.add_scores(name, number, suite)

    def collect(self, keep: int, who: str, *, dry_run: bool) -> Collected:
        """Remove the files of old versions, and those that no version has."""
        with self.database.content_lock(alone=True):
            with self.writing(who) as ledger:
                gone = upkeep.collectable(ledger.connection, keep)
                for name, number in gone:
                    ledger.collect(name, number)
                unused = dict(upkeep.unused(ledger.connection, self.store))
                collected = upkeep.collected(ledger.connection)  # some by a command that was killed
                if dry_run:
                    ledger.connection.rollback()
            if not dry_run:
                for sha256 in unused:
                    self.store.remove(sha256)
                upkeep.remove_views(self.views, collected)
                upkeep.remove_partial(*self._partial)
        return Collected(tuple(f"{name}@{number}" for name, number in gone), len(unused), sum(unused.values()), dry_run)

    def verify(self, progress: Progress) -> tuple[list[str], int]:
        """Everything that is wrong, a line each, and how many versions were looked at."""
        with self.database.content_lock(alone=False), self.reading() as connection:
            problems = upkeep.verify_records(connection)
            problems += upkeep.verify_content(connection, self.store, progress)
            count = connection.scalar(select(func.count()).select_from(versions))
        return problems, int(count or 0)

    def _store_files(self, source: VersionSource, progress: Progress, *, dry_run: bool) -> dict[str, Blob]:
        local = source.files()
        sizes = {path: file.stat().st_size for path, file in local.items()}
        blobs = {}
        with _disk_errors(), progress.track("read" if dry_run else "store", sum(sizes.values()), "bytes") as advance:
            for path, file in local.items():
                link = path.startswith(f"{EXPORTS}/")
                blobs[path] = Blob(**digest(file)) if dry_run else self.store.put(file, link=link)
                advance(sizes[path])
        return blobs

    def _forget_views_of_mended(self, connection: Connection) -> None:
        """Directories share the files that were damaged and put again: they are made again."""
        if isinstance(self.store, FolderStore) and self.store.mended:
            query = select(files.c.name, files.c.number).where(files.c.sha256.in_(self.store.mended)).distinct()
            upkeep.remove_views(self.views, [(row.name, row.number) for row in connection.execute(query)])
            self.store.mended.clear()


@contextmanager
def to_plan_with(location: Location) -> Iterator[OpenRegistry]:
    """The registry there, for a dry run; where there is no folder of one yet, an empty one that is gone afterwards."""
    with ExitStack() as stack:
        try:
            opened = OpenRegistry(location)
        except NoRegistry:
            if not location.folder:
                raise
            folder = stack.enter_context(scratch.temporary_folder("registry"))
            opened = OpenRegistry(replace(location, folder=Path(folder)), create=True)
        stack.callback(opened.close)
        yield opened


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RegistryError(
            f"{where}{error.strerror or error}", "nothing was added: make room there, or see that it may be written"
        ) from None


def _views(location: Location, content: str) -> Path:
    """Beside a registry in a folder; of one elsewhere on this machine, in its cache."""
    if location.folder:
        return location.folder / VIEWS
    key = hashlib.sha256(f"{location.shown} {content}".encode()).hexdigest()[:16]
    return cache_folder() / "registry" / key / VIEWS
