"""The tables of a registry, the same in sqlite and Postgres. Times are text, ``2026-11-28T09:30:00Z``, always UTC.

setting    the number of this schema, and where files lie
version    one state of an adapter; what it was made from and with is in ``facts``, as JSON
file       every file of a version by its path in it; the bytes lie in the content store, by their sha256
export     the exports of a version, each with its manifest and the verdict of parity in it
score      figures of a version on a suite; ``suite_sha256`` says which rows and settings these were
alias      names that move: champion, staging, ...
event      what was done, by whom and why; nothing in it is changed or deleted
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)  # fmt: skip

SCHEMA = 2
metadata = MetaData()

settings = Table("setting", metadata, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))

versions = Table(
    "version", metadata,
    Column("name", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("sha256", Text, nullable=False),  # of the content, whatever its base is called there
    Column("state", Text, nullable=False),  # active, retired, or collected: its files are gone
    Column("domain", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("created", Text, nullable=False),  # when it was trained
    Column("added", Text, nullable=False),
    Column("run", Text, nullable=False),
    Column("base", Text, nullable=False),
    Column("base_sha256", Text, nullable=False),  # of its config and of the names and shapes of its tensors
    Column("method", Text, nullable=False),
    Column("rank", Integer),
    Column("alpha", Float),
    Column("learning_rate", Float),
    Column("steps", BigInteger),
    Column("rows", BigInteger),
    Column("quantization", Text, nullable=False),
    Column("data", Text, nullable=False, server_default=""),  # sha256 of each file of rows that it was trained on
    Column("bytes", BigInteger, nullable=False),
    Column("facts", Text, nullable=False),
    UniqueConstraint("name", "sha256"),
    Index("version_by_domain", "domain"),
    Index("version_by_created", "created"),
)  # fmt: skip


def _of_version(table: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["name", "number"], ["version.name", "version.number"], name=f"{table}_of_version")


files = Table(
    "file", metadata,
    Column("name", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("path", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    _of_version("file"),
    Index("file_by_content", "sha256"),
)  # fmt: skip

exports = Table(
    "export", metadata,
    Column("name", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("label", Text, primary_key=True),  # gguf-Q4_K_M
    Column("target", Text, nullable=False),
    Column("quant", Text),
    Column("bytes", BigInteger, nullable=False),
    Column("unproven", Text, nullable=False),  # why parity is not proven; empty where it is
    Column("manifest", Text, nullable=False),
    _of_version("export"),
)  # fmt: skip

scores = Table(
    "score", metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("suite", Text, nullable=False),
    Column("suite_sha256", Text, nullable=False),
    Column("metric", Text, nullable=False),
    Column("value", Float, nullable=False),
    Column("low", Float),
    Column("high", Float),
    Column("n", BigInteger),
    Column("higher_is_better", Boolean, nullable=False),
    Column("engine", Text, nullable=False),
    Column("created", Text, nullable=False),  # when it was measured
    UniqueConstraint("name", "number", "suite", "suite_sha256", "metric", "engine", "created"),
    _of_version("score"),
    Index("score_by_metric", "suite", "metric", "created"),
)  # fmt: skip

aliases = Table(
    "alias", metadata,
    Column("name", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("number", Integer, nullable=False),
    _of_version("alias"),
)  # fmt: skip

events = Table(
    "event", metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Text, nullable=False),
    Column("who", Text, nullable=False),
    # add, export, score, promote, rollback, unset, stop-shadow, retire, collect, restore, parity
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("alias", Text, nullable=False),
    Column("old", Integer),
    Column("new", Integer),
    Column("why", Text, nullable=False),
    Column("overridden", Text, nullable=False),  # the gates that --force went past
    Index("event_by_name", "name", "id"),
)  # fmt: skip

_REFUSAL = "events are never changed"
_TRIGGERS = {
    "sqlite": tuple(
        f"CREATE TRIGGER event_no_{action.lower()} BEFORE {action} ON event "
        f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
        for action in ("UPDATE", "DELETE")
    ),
    "postgresql": (
        "CREATE OR REPLACE FUNCTION lora2serve_event_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
        "CREATE TRIGGER event_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON event "
        "FOR EACH STATEMENT EXECUTE FUNCTION lora2serve_event_refuse()",
    ),
}


def create(connection: Connection) -> None:
    """All tables, and the triggers that keep events as they are, in the transaction of the connection."""
    metadata.create_all(connection)
    for statement in _TRIGGERS[connection.dialect.name]:
        connection.exec_driver_sql(statement)
