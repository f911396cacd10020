"""The database of a registry: opened, its schema looked at, transactions."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, exc, pool, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from lora2serve.config.schema import show
from lora2serve.errors import InputError, RegistryError, UsageError, first_line
from lora2serve.registry import migrations, tables
from lora2serve.registry.content_store import folder_lock
from lora2serve.registry.location import Location, refuse_shared

PATIENCE = 60.0  # seconds to wait for another process that writes
LOCK = 0x6C327372  # of Postgres' advisory locks, ours
WRITING = ".writing"  # the lock of a sqlite file's writers
ADDING = ".adding"  # that which is held while files are added, and alone while they are removed
CONTENT = "content"  # the setting that says where files lie; of sqlite, empty: beside the file
UNWRITABLE = ("unable to open database file", "disk I/O error", "readonly database", "disk is full")  # what sqlite says
GONE = "it was removed while it was open: bring it back from a copy, or begin a new one"
HINTS = {
    "database is locked": "another process has been writing for a minute: see what it does",
    "disk I/O error": "is the disk full, or damaged? make room, and run it again",
    "database or disk is full": "make room on that disk, and run it again",
    "attempt to write a readonly database": "use a registry that you may write to",
    "file is not a database": "the file is damaged: bring back a copy of it",
    "database disk image is malformed": "the file is damaged: bring back a copy of it",
    "unable to open database file": "look whether you may read and write that folder",
    "no such table": GONE,
    'relation "': GONE,  # of Postgres
}


class NoRegistry(UsageError):
    """Nothing that was ever made is there."""


class Database:
    """One open registry. Connections are made when they are needed; ``close`` ends them."""

    def __init__(self, location: Location, *, create: bool = False, content: str = "") -> None:
        """UsageError where there is none, unless it is to be made; InputError where it is of a newer lora2serve."""
        self.location = location
        if location.folder:
            refuse_shared(location.folder)
            if create:
                location.folder.mkdir(parents=True, exist_ok=True)
            elif not location.file.is_file():
                raise _none_there(location)
        self.engine: Engine = _engine(location)
        self._mode = "rwc" if create else "rw"  # of a sqlite file
        with self.errors():
            self._prepare(create, content)
        self._mode = "rw"  # what is removed from now on is not made again, empty

    @property
    def content(self) -> str:
        """Where files lie: a folder or a URL of fsspec; empty for the registry's own folder."""
        settings = tables.settings
        with self.reading() as connection:
            return str(connection.scalar(select(settings.c.value).where(settings.c.key == CONTENT)) or "")

    def close(self) -> None:
        """End its connections; those to a sqlite file end with their transactions."""
        if not self.location.folder:
            self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that sees one state; also on a disk that is full or read-only."""
        with self.errors(), ExitStack() as stack:
            try:
                connection = stack.enter_context(self._connect())
            except exc.OperationalError as error:
                unwritable = any(text in str(error.orig) for text in UNWRITABLE)
                if not self.location.folder or not unwritable or self._is_gone or _unmerged(self.location.file):
                    raise
                stack.enter_context(folder_lock(self.location.folder, WRITING, alone=False))
                connection = stack.enter_context(_still_engine(self.location).connect())
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction that nobody else writes beside; committed at the end, undone by an exception."""
        with self.errors(), self._turn(), self._connect() as plain:
            connection = plain.execution_options(lora2serve_write=True)
            with connection.begin():
                if not self.location.folder:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK}, 0)")
                yield connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Writers of a sqlite file come one after another: it has no queue, and leaves some waiting for minutes."""
        if self.location.folder:
            with folder_lock(self.location.folder, WRITING, alone=True):
                yield
        else:
            yield

    @contextmanager
    def content_lock(self, *, alone: bool) -> Iterator[None]:
        """Held while files are added or removed; ``alone``: nobody else holds it."""
        if self.location.folder:
            with self.errors(), folder_lock(self.location.folder, ADDING, alone=alone):
                yield
            return
        kind = "" if alone else "_shared"
        with self.errors(), self._connect() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock{kind}({LOCK}, 1)")
            connection.commit()
            try:
                yield
            finally:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock{kind}({LOCK}, 1)")
                connection.commit()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What the database, or its driver before it, refuses, in one line."""
        try:
            yield
        except (exc.DBAPIError, FileNotFoundError) as error:
            if self._is_gone:
                raise RegistryError(f"registry {self.location.shown}: no longer there", GONE) from None
            if isinstance(error, FileNotFoundError):
                raise
            reason = first_line(error.orig or error)
            hint = next((hint for text, hint in HINTS.items() if text in reason), "")
            raise RegistryError(f"registry {self.location.shown}: {reason}", hint) from None
        except UnicodeEncodeError as error:  # half a character: of an argument that is not UTF-8, or out of JSON
            raise UsageError(f"{show(error.object)}: expected Unicode text") from None

    def _connect(self) -> Connection:
        if not self.location.folder:
            return self.engine.connect()
        token = _address.set(f"file://{quote(os.fsencode(self.location.file.absolute()))}?mode={self._mode}")
        try:
            return self.engine.connect()
        finally:
            _address.reset(token)

    @property
    def _is_gone(self) -> bool:
        """Whether the file of an open registry is there no longer."""
        return bool(self.location.folder) and not self.location.file.is_file()

    def _prepare(self, create: bool, content: str) -> None:
        found = migrations.schema_of(self)
        if found is None:
            if not create:
                raise _none_there(self.location)
            with self.writing() as connection:
                if migrations.read_schema(connection) is None:  # another process may have been faster
                    tables.create(connection)
                    values = {"schema": str(tables.SCHEMA), CONTENT: content}
                    rows = [{"key": key, "value": value} for key, value in values.items()]
                    connection.execute(tables.settings.insert(), rows)
        elif found > tables.SCHEMA:
            raise InputError(
                f"registry {self.location.shown}: written by a newer lora2serve (schema {found}, "
                f"this one knows {tables.SCHEMA})", "pip install --upgrade lora2serve",
            )  # fmt: skip
        elif found < tables.SCHEMA:
            migrations.migrate(self)
        if content and self.content != content:
            raise UsageError(
                f"registry {self.location.shown}: files lie in {self.content or 'its own folder'}, not in {content}",
                "that is chosen once, by `lora2serve registry init`",
            )


def _none_there(location: Location) -> NoRegistry:
    return NoRegistry(
        f"no registry at {location.shown}",
        "`lora2serve registry add RUN --name NAME` makes one"
        if location.folder
        else "`lora2serve registry init` makes one",
    )


def _engine(location: Location) -> Engine:
    if location.folder:
        return _sqlite_engine()
    try:
        return create_engine(location.url, poolclass=pool.NullPool, connect_args={"connect_timeout": 10})
    except exc.ArgumentError as error:
        raise UsageError(f"registry {location.shown}: {first_line(error)}") from None


_address: ContextVar[str] = ContextVar("address")  # of the file that a connection is made to


@cache
def _sqlite_engine() -> Engine:
    """One for all sqlite files: it compiles each question once, where an engine of each file's own would again."""

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(_address.get(), uri=True, timeout=PATIENCE, check_same_thread=False)

    engine = create_engine("sqlite://", creator=connect, poolclass=pool.NullPool)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    token = _address.set(":memory:")  # all wait for an engine's first connection: this one waits for nobody
    try:
        engine.connect().close()
    finally:
        _address.reset(token)
    return engine


def _still_engine(location: Location) -> Engine:
    """Reads a sqlite file without the files that sqlite makes beside it; right while nobody writes."""

    def connect() -> sqlite3.Connection:
        address = f"file://{quote(os.fsencode(location.file.absolute()))}?immutable=1"
        return sqlite3.connect(address, uri=True, check_same_thread=False)

    return create_engine("sqlite://", creator=connect, poolclass=pool.NullPool)


def _unmerged(file: Path) -> bool:
    """Whether what was written last is not in the file yet."""
    log = file.with_name(f"{file.name}-wal")
    return log.is_file() and log.stat().st_size > 0


def _set_up_sqlite(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None  # transactions begin where we say, tables are made in them too
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}").close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("lora2serve_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
