"""What keeps a registry whole and small: ``verify`` compares everything with everything, ``gc`` removes files."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, select

from lora2serve.artifacts.version_marker import is_of_version
from lora2serve.errors import InputError
from lora2serve.progress import Progress
from lora2serve.registry.content_store import PARTIAL, Blob, ContentStore, staged
from lora2serve.registry.ledger import replayed
from lora2serve.registry.tables import aliases, events, exports, files, versions
from lora2serve.registry.version_rows import read_versions


@dataclass(frozen=True)
class Collected:
    """What ``gc`` removed, or would remove: versions as ``name@number``, files and bytes of the store."""

    versions: tuple[str, ...]
    files: int
    bytes: int
    dry_run: bool


def verify_records(connection: Connection) -> list[str]:
    """What in the tables contradicts itself, a line each."""
    rows = [dict(row) for row in connection.execute(select(events).order_by(events.c.id)).mappings()]
    expected = replayed(rows)
    actual = {(row.name, row.alias): row.number for row in connection.execute(select(aliases))}
    problems = []
    for name, alias in sorted(expected.keys() | actual.keys()):
        new, number = expected.get((name, alias)), actual.get((name, alias))
        if new != number:
            problems.append(f"{name}@{alias}: points to {number}, and by the events to {new}")
    query = select(versions.c.name, versions.c.number, versions.c.state)
    states = {(row.name, row.number): row.state for row in connection.execute(query)}
    for (name, alias), number in actual.items():
        if states.get((name, number), "collected") == "collected":
            problems.append(f"{name}@{alias}: points to {number}, which has no files")
    return [
        *_damage(connection),
        *_unreadable(connection, sorted(states)),
        *problems,
        *_broken_chains(rows),
        *_without_files(connection, states),
    ]


def verify_content(connection: Connection, store: ContentStore, progress: Progress) -> list[str]:
    """Files that are missing or changed, a line for each version that has them."""
    uses: dict[Blob, list[str]] = defaultdict(list)
    for row in connection.execute(select(files).order_by(files.c.name, files.c.number, files.c.path)):
        uses[Blob(row.sha256, row.size)].append(f"{row.name}@{row.number}: {row.path}")
    problems = []
    with progress.track("verify", sum(blob.size for blob in uses), "bytes") as advance:
        for blob, users in uses.items():
            if problem := store.problem(blob):
                problems += [f"{user}: {problem}" for user in users]
            advance(blob.size)
    return problems


def collectable(connection: Connection, keep: int) -> list[tuple[str, int]]:
    """The versions whose files may go: of each name not the ``keep`` newest, none that an alias points to, and none of
    the last ``keep`` that an alias pointed to.
    """
    pointed = {(row.name, row.number) for row in connection.execute(select(aliases.c.name, aliases.c.number))}
    staying = set(pointed)
    for recent in _recent(connection).values():
        staying |= set(recent[:keep])
    numbers: dict[str, list[int]] = defaultdict(list)
    query = select(versions.c.name, versions.c.number).where(versions.c.state != "collected")
    for row in connection.execute(query.order_by(versions.c.name, versions.c.number.desc())):
        numbers[row.name].append(row.number)
    old = [(name, number) for name, own in numbers.items() for number in own[keep:]]
    return sorted(key for key in old if key not in staying)


def unused(connection: Connection, store: ContentStore) -> Mapping[str, int]:
    """Blobs that no version has, sha256 -> bytes: also what a killed command left."""
    used = set(connection.scalars(select(files.c.sha256).distinct()))
    return {sha256: size for sha256, size in store.sizes().items() if sha256 not in used}


def collected(connection: Connection) -> list[tuple[str, int]]:
    """The versions whose files are gone."""
    query = select(versions.c.name, versions.c.number).where(versions.c.state == "collected")
    return [(row.name, row.number) for row in connection.execute(query)]


def remove_views(views: Path, gone: Iterable[tuple[str, int]]) -> None:
    """Directories of versions. Each goes in one step: half of one, without its marker, would be nobody's for good."""
    for name, number in gone:
        folder = views / f"{name}-{number}"
        if is_of_version(folder):
            with suppress(OSError), staged(views) as going:
                os.rename(folder, going / folder.name)


def remove_partial(*roots: Path) -> None:
    """What killed commands left half-made; only while nobody else adds anything."""
    for root in roots:
        shutil.rmtree(root / PARTIAL, ignore_errors=True)


def _recent(connection: Connection) -> Mapping[tuple[str, str], list[tuple[str, int]]]:
    """(name, alias) -> the versions that it pointed to, each once, the last first."""
    query = select(events.c.name, events.c.alias, events.c.new).where(events.c.alias != "", events.c.new.is_not(None))
    recent: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for row in connection.execute(query.order_by(events.c.id.desc())):
        key = (row.name, row.new)
        if key not in recent[row.name, row.alias]:
            recent[row.name, row.alias].append(key)
    return recent


def _damage(connection: Connection) -> list[str]:
    """What sqlite finds in its own file: pages that do not fit each other, indexes that miss rows, stray rows."""
    if connection.dialect.name != "sqlite":
        return []
    lines = [str(line) for line in connection.exec_driver_sql("PRAGMA integrity_check(20)").scalars()]
    strays = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return [
        *(f"database: {first_line}" for line in lines if line != "ok" for first_line in line.splitlines()[:1]),
        *(f"database: a row of {row[0]} is of no version" for row in strays[:20]),
    ]


def _unreadable(connection: Connection, keys: Sequence[tuple[str, int]]) -> list[str]:
    """Records of versions that no command can read."""
    try:
        read_versions(connection, keys)
        return []
    except InputError as error:
        if len(keys) == 1:
            return error.message.splitlines()
    middle = len(keys) // 2
    return _unreadable(connection, keys[:middle]) + _unreadable(connection, keys[middle:])


def _broken_chains(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Events that begin where the one before did not end."""
    problems, last = [], dict[tuple[object, object], object]()
    for row in rows:
        if row["alias"]:
            key = row["name"], row["alias"]
            if last.get(key) != row["old"]:
                problems.append(f"event {row['id']}: {key[0]}@{key[1]} from {row['old']}, expected {last.get(key)}")
            last[key] = row["new"]
    return problems


def _without_files(connection: Connection, states: Mapping[tuple[str, int], str]) -> list[str]:
    there = {(row.name, row.number) for row in connection.execute(select(files.c.name, files.c.number).distinct())}
    exported = {(row.name, row.number) for row in connection.execute(select(exports.c.name, exports.c.number))}
    missing = sorted(key for key, state in states.items() if state != "collected" and key not in there)
    left = sorted(key for key, state in states.items() if state == "collected" and key in there | exported)
    return [
        *(f"{name}@{number}: has no files" for name, number in missing),
        *(f"{name}@{number}: collected, and has files" for name, number in left),
    ]
