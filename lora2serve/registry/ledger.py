"""What is written into a registry: versions, their exports and scores, aliases; each with an event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Connection, and_, func, select

from lora2serve.artifacts.suite_scores import FOLDER as EVALS
from lora2serve.artifacts.suite_scores import SuiteScores
from lora2serve.errors import UsageError
from lora2serve.registry.content_store import Blob
from lora2serve.registry.tables import aliases, events, exports, files, scores, versions
from lora2serve.registry.version_facts import utc
from lora2serve.registry.version_record import JudgedGate
from lora2serve.registry.version_source import EXPORTS, PARITY, VersionSource

LATER = (f"{EVALS}/", f"{PARITY}/")  # folders of a version that are measured after it was made


@dataclass(frozen=True)
class Labels:
    """What a person says of a version; ``author`` made it, and ``who`` writes it down."""

    domain: str = ""
    task: str = ""
    note: str = ""
    author: str = ""


@dataclass(frozen=True)
class Ledger:
    """One transaction by ``who``; ``files`` and ``gates`` are what it wrote and judged, for those who report it."""

    connection: Connection
    who: str
    files: list[str] = field(default_factory=list)  # paths in a version
    gates: list[JudgedGate] = field(default_factory=list)

    def add_version(self, name: str, source: VersionSource, blobs: Mapping[str, Blob], labels: Labels) -> int:
        """The number of the version that this content is, a new one where it is new; exports and scores go to it.

        UsageError where the version is there and says something else.
        """
        identity = source.identity({path: blob.sha256 for path, blob in blobs.items()})
        same = and_(versions.c.name == name, versions.c.sha256 == identity)
        row = self.connection.execute(select(versions).where(same)).mappings().one_or_none()
        if row is None:
            number = self._insert(name, identity, source, labels)
        else:
            number = int(row["number"])
            _refuse_other_labels(f"{name}@{number}", dict(row), labels)
            if row["state"] == "collected":
                self._restore(name, number)
        self.add_files(name, number, blobs)
        self._add_exports(name, number, source, blobs)
        for suite in source.scores():
            self.add_scores(name, number, suite)
        self._add_up(name, number)
        return number

    def add_scores(self, name: str, number: int, suite: SuiteScores) -> None:
        """Write down the scores of one suite that are new."""
        shared = {
            "name": name, "number": number, "suite": suite.suite, "suite_sha256": suite.suite_sha256,
            "engine": suite.engine, "created": suite.created,
        }  # fmt: skip
        same = and_(*(scores.c[key] == value for key, value in shared.items()))
        there = set(self.connection.scalars(select(scores.c.metric).where(same)))
        new = [
            {
                **shared, "metric": metric, "value": figure.value, "low": figure.low, "high": figure.high,
                "n": figure.n, "higher_is_better": figure.higher_is_better,
            }
            for metric, figure in suite.metrics.items()
            if metric not in there
        ]  # fmt: skip
        if new:
            self.connection.execute(scores.insert(), new)
            self.record("score", name, new=number, why=suite.suite)

    def set_manifest(self, name: str, number: int, label: str, manifest: str, unproven: str) -> None:
        """The verdict of parity on an export, as its manifest has it now."""
        row = and_(exports.c.name == name, exports.c.number == number, exports.c.label == label)
        before = self.connection.scalar(select(exports.c.manifest).where(row))
        if before is not None and before != manifest:  # an export that was made there later is not registered
            self.connection.execute(exports.update().where(row).values(manifest=manifest, unproven=unproven))
            self.record("parity", name, new=number, why=f"{label}: {unproven or 'met'}")

    def move(self, kind: str, name: str, alias: str, number: int, *, why: str, overridden: str = "") -> None:
        """Let an alias point to a version; nothing where it does."""
        row = and_(aliases.c.name == name, aliases.c.alias == alias)
        old = self.connection.scalar(select(aliases.c.number).where(row))
        if old == number:
            return
        if old is None:
            self.connection.execute(aliases.insert(), {"name": name, "alias": alias, "number": number})
        else:
            self.connection.execute(aliases.update().where(row).values(number=number))
        self.record(kind, name, alias=alias, old=old, new=number, why=why, overridden=overridden)

    def unset(self, name: str, alias: str, *, why: str) -> None:
        """Remove an alias; nothing where it is not there."""
        row = and_(aliases.c.name == name, aliases.c.alias == alias)
        old = self.connection.scalar(select(aliases.c.number).where(row))
        if old is not None:
            self.connection.execute(aliases.delete().where(row))
            self.record("unset", name, alias=alias, old=old, why=why)

    def retire(self, name: str, number: int, why: str) -> None:
        """A version that no alias may point to any more."""
        self._set_state(name, number, "retired", "retire", why)

    def collect(self, name: str, number: int) -> None:
        """Forget the files of a version; its record stays."""
        for table in (files, exports):
            self.connection.execute(table.delete().where(table.c.name == name, table.c.number == number))
        self._set_state(name, number, "collected", "collect")

    def record(
        self, kind: str, name: str, *, alias: str = "", old: int | None = None, new: int | None = None, why: str = "",
        overridden: str = "",
    ) -> None:  # fmt: skip
        """Append an event."""
        values = {
            "at": now(), "who": self.who, "kind": kind, "name": name, "alias": alias, "old": old, "new": new,
            "why": why, "overridden": overridden,
        }  # fmt: skip
        self.connection.execute(events.insert(), values)

    def _insert(self, name: str, identity: str, source: VersionSource, labels: Labels) -> int:
        last = self.connection.scalar(select(func.max(versions.c.number)).where(versions.c.name == name))
        number, facts = (last or 0) + 1, source.facts()
        values = {
            "name": name, "number": number, "sha256": identity, "state": "active", "domain": labels.domain,
            "task": labels.task, "note": labels.note, "author": labels.author or self.who, "bytes": 0,
            "created": source.created(), "added": now(), "facts": facts.to_text(indent=1),
            **source.settings(facts).columns(),
        }  # fmt: skip
        self.connection.execute(versions.insert(), values)
        self.record("add", name, new=number, why=labels.note)
        return number

    def _restore(self, name: str, number: int) -> None:
        """The files of a version are there again; one that was retired stays so."""
        retired = and_(events.c.name == name, events.c.new == number, events.c.kind == "retire")
        count = self.connection.scalar(select(func.count()).select_from(events).where(retired))
        self._set_state(name, number, "retired" if count else "active", "restore")

    def add_files(self, name: str, number: int, blobs: Mapping[str, Blob]) -> None:
        """Those outside exports: what it is stays as it is, what is measured of it may change."""
        own = and_(files.c.name == name, files.c.number == number)
        there = {
            row.path: row.sha256 for row in self.connection.execute(select(files.c.path, files.c.sha256).where(own))
        }
        new = []
        for path, blob in blobs.items():
            if path.startswith(f"{EXPORTS}/"):
                continue
            row = {"name": name, "number": number, "path": path, "sha256": blob.sha256, "size": blob.size}
            if path not in there:
                new.append(row)
            elif path.startswith(LATER) and there[path] != blob.sha256:
                self.connection.execute(files.update().where(own, files.c.path == path).values(row))
                self.files.append(path)
        self.files.extend(str(row["path"]) for row in new)
        if new:
            self.connection.execute(files.insert(), new)

    def _add_exports(self, name: str, number: int, source: VersionSource, blobs: Mapping[str, Blob]) -> None:
        own = and_(exports.c.name == name, exports.c.number == number)
        there = set(self.connection.scalars(select(exports.c.label).where(own)))
        for label, export in source.exports.items():
            prefix = f"{EXPORTS}/{label}/"
            new = {path: blob for path, blob in blobs.items() if path.startswith(prefix)}
            manifest, unproven = export.manifest.to_text(), export.manifest.unproven()
            if label in there:
                self._refuse_other_export(f"{name}@{number}/{label}", name, number, prefix, new)
                self.set_manifest(name, number, label, manifest, unproven)
                continue
            rows = [
                {"name": name, "number": number, "path": path, "sha256": blob.sha256, "size": blob.size}
                for path, blob in new.items()
            ]
            self.connection.execute(files.insert(), rows)
            self.files.extend(new)
            values = {
                "name": name, "number": number, "label": label, "target": export.target, "quant": export.quant,
                "bytes": export.bytes, "unproven": unproven, "manifest": manifest,
            }  # fmt: skip
            self.connection.execute(exports.insert(), values)
            self.record("export", name, new=number, why=label)

    def _refuse_other_export(self, shown: str, name: str, number: int, prefix: str, blobs: Mapping[str, Blob]) -> None:
        query = select(files.c.path, files.c.sha256).where(
            files.c.name == name, files.c.number == number, files.c.path.startswith(prefix, autoescape=True)
        )
        there = {row.path: row.sha256 for row in self.connection.execute(query)}
        sums = {path: blob.sha256 for path, blob in blobs.items()}
        other = sorted(path for path in there.keys() | sums.keys() if there.get(path) != sums.get(path))
        if other:
            raise UsageError(
                f"{shown}: there already, with another {other[0].removeprefix(prefix)}: a version does not change",
                "name the exports to add, without that one",
            )

    def _add_up(self, name: str, number: int) -> None:
        own = and_(files.c.name == name, files.c.number == number)
        total = self.connection.scalar(select(func.sum(files.c.size)).where(own))
        row = and_(versions.c.name == name, versions.c.number == number)
        self.connection.execute(versions.update().where(row).values(bytes=int(total or 0)))

    def _set_state(self, name: str, number: int, state: str, kind: str, why: str = "") -> None:
        row = and_(versions.c.name == name, versions.c.number == number)
        self.connection.execute(versions.update().where(row).values(state=state))
        self.record(kind, name, new=number, why=why)


def replayed(changes: Sequence[Mapping[str, object]]) -> dict[tuple[str, str], int]:
    """The aliases as events leave them: (name, alias) -> number."""
    last = {(str(row["name"]), str(row["alias"])): row["new"] for row in changes if row["alias"]}
    return {key: int(str(number)) for key, number in last.items() if number is not None}


def now() -> str:
    """The time, as registries have it."""
    return utc(datetime.now(UTC))


def _refuse_other_labels(shown: str, row: Mapping[str, object], labels: Labels) -> None:
    for key in ("domain", "task", "note", "author"):
        value = getattr(labels, key)
        if value and value != row[key]:
            raise UsageError(
                f"{shown}: there already, with {key} {row[key]!r}, not {value!r}: a version does not change",
                f"add it without --{key}",
            )
