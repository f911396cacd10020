"""Records of requests and feedback, in one sqlite file that several gateways of one machine may share.

entry      one row each, in the order in which they came; ``content`` is JSON
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from lora2serve.errors import InputError
from lora2serve.gateway.request_record import Arm, Feedback, RequestRecord, from_text, to_text

FILE = "traffic.db"
PATIENCE = 5.0  # seconds to wait for another gateway that writes
MOST_BYTES = 1 << 30  # of the file, before the oldest entries go
SOME = 1000  # entries that are read at once, or removed
LAST = 20  # entries of one request id that are looked at
KINDS = {"request": RequestRecord, "feedback": Feedback}
SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, request_id TEXT NOT NULL, name TEXT NOT NULL,
    at REAL NOT NULL, content TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS entry_by_request ON entry (request_id);
CREATE INDEX IF NOT EXISTS entry_by_name ON entry (name, at);
"""
Entry = RequestRecord | Feedback


class TrafficStore:
    """The entries in ``folder``. A connection belongs to no thread: one thread at a time may use a store."""

    def __init__(self, folder: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self.path, self.most_bytes = folder / FILE, most_bytes
        self._connection: sqlite3.Connection | None = None
        self._inode = 0  # of the file that it has open

    def append(self, entries: Sequence[Entry]) -> list[Entry]:
        """Write all of them or none; with their sequence. sqlite3.Error or OSError where the disk refuses."""
        connection = self._open()
        numbered: list[Entry] = []
        try:
            with connection:
                for entry in entries:
                    name = entry.name if isinstance(entry, RequestRecord) else ""
                    kind = "request" if isinstance(entry, RequestRecord) else "feedback"
                    row = (kind, entry.request_id, name, entry.at, to_text(entry))
                    insert = "INSERT INTO entry (kind, request_id, name, at, content) VALUES (?, ?, ?, ?, ?)"
                    numbered.append(replace(entry, sequence=connection.execute(insert, row).lastrowid or 0))
                self._remove_oldest(connection)
        except sqlite3.Error:
            self.close()  # whatever it is, the next try begins anew
            raise
        return numbered

    def of_request(self, request_id: str) -> tuple[RequestRecord, ...]:
        """The records of a request, one for each arm; of an id that was used again, those of its last request."""
        by_arm: dict[Arm, RequestRecord] = {}
        for entry in self._last_of("request", request_id):
            assert isinstance(entry, RequestRecord)
            if entry.arm != "shadow" and any(_is_an_answer(record) for record in by_arm.values()):
                by_arm = {}  # another request of that id
            by_arm[entry.arm] = entry
        return tuple(by_arm.values())

    def repeats(self, feedback: Feedback, records: Sequence[RequestRecord]) -> bool:
        """Whether just this was said of these records before, as by a client that did not see that it was stored."""
        before = max((record.sequence for record in records), default=0)
        known = [entry for entry in self._last_of("feedback", feedback.request_id) if entry.sequence > before]
        return any(replace(feedback, at=entry.at, sequence=entry.sequence) == entry for entry in known)

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Records and feedback in their order, those behind ``after``."""
        while True:
            some = self._rows("sequence > ?", (after,))
            yield from some
            if len(some) < SOME:
                return
            after = some[-1].sequence

    def requests(self, name: str, since: float = 0.0, until: float = float("inf")) -> Iterator[RequestRecord]:
        """The records of one route that came in that time, the first first."""
        after = 0
        while True:
            condition = "kind = 'request' AND name = ? AND at >= ? AND at < ? AND sequence > ?"
            some = self._rows(condition, (name, since, until, after))
            yield from (entry for entry in some if isinstance(entry, RequestRecord))
            if len(some) < SOME:
                return
            after = some[-1].sequence

    def last_sequence(self) -> int:
        """That of the newest entry; 0 without any."""
        newest = self._rows("sequence = (SELECT max(sequence) FROM entry)", ())
        return newest[-1].sequence if newest else 0

    def close(self) -> None:
        """End its connection."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def _last_of(self, kind: str, request_id: str) -> list[Entry]:
        """The newest entries on a request; clients may use an id as often as they like."""
        condition = (
            "sequence IN (SELECT sequence FROM entry WHERE kind = ? AND request_id = ? ORDER BY sequence DESC LIMIT ?)"
        )
        return self._rows(condition, (kind, request_id, LAST))

    def _rows(self, condition: str, values: Sequence[str | float]) -> list[Entry]:
        if not self.path.is_file():
            return []
        query = f"SELECT kind, content, sequence FROM entry WHERE {condition} ORDER BY sequence LIMIT {SOME}"
        try:
            with closing(self._open().execute(query, values)) as cursor:
                return [from_text(KINDS[kind], content, sequence) for kind, content, sequence in cursor]
        except (sqlite3.DatabaseError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path}: {error}", "the file is damaged, or not one of a gateway") from None

    def _open(self) -> sqlite3.Connection:
        if self._connection and _inode(self.path) != self._inode:  # somebody has removed it, and another one is there
            self.close()
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # it may hold texts: nobody else reads it
            connection = sqlite3.connect(self.path, timeout=PATIENCE, check_same_thread=False)
            _set_up(connection)
            self._connection, self._inode = connection, _inode(self.path)
        return self._connection

    def _remove_oldest(self, connection: sqlite3.Connection) -> None:
        def pragma(name: str) -> int:
            return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

        while (pragma("page_count") - pragma("freelist_count")) * pragma("page_size") > self.most_bytes:
            oldest = f"DELETE FROM entry WHERE sequence IN (SELECT sequence FROM entry ORDER BY sequence LIMIT {SOME})"
            if not connection.execute(oldest).rowcount:
                return


def _set_up(connection: sqlite3.Connection) -> None:
    """Again while somebody else does the same: sqlite does not wait where two turn a new file into WAL."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                connection.close()
                raise
            time.sleep(0.005)
    connection.execute("PRAGMA synchronous=NORMAL").close()
    connection.executescript(SCHEMA).close()


def _is_an_answer(record: RequestRecord) -> bool:
    """Whether a client got it: where the challenger could not answer, the champion did."""
    return record.arm != "shadow" and (record.arm != "challenger" or record.ok)


def _inode(path: Path) -> int:
    """Which file that is; 0 where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0
