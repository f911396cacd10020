"""Questions to a registry: which versions there are, and which was best at what, and when."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, and_, select
from sqlalchemy.exc import DBAPIError

from lora2serve.errors import UsageError, did_you_mean, first_line
from lora2serve.registry.database import Database
from lora2serve.registry.tables import aliases, scores, versions
from lora2serve.registry.version_record import Version
from lora2serve.registry.version_rows import Key, complete, read_versions
from lora2serve.registry.where_clause import metric_name, parse_where
from lora2serve.system.small_files import digest

_AGE = (scores.c.created, scores.c.id)
MOST_ROWS = 100_000  # of an answer to ``sql``
MOST_VERSIONS = 1 << 31  # their numbers have 32 bits
STEPS = 100_000  # of sqlite's machine between two looks for Ctrl-C
READING = "it only reads: docs/registry.md has the tables"


@dataclass(frozen=True)
class VersionQuery:
    """What versions are looked for; empty fields ask nothing. ``since`` is in the period, ``until`` is not."""

    name: str = ""
    domain: str = ""
    task: str = ""
    author: str = ""
    alias: str = ""
    data_sha256: str = ""  # of a file of rows that they were trained on, or its beginning
    metric: str = ""  # SUITE.METRIC
    suite_sha256: str = ""  # its beginning
    since: str = ""
    until: str = ""
    where: str = ""
    best: bool = False
    limit: int | None = None


def find_versions(connection: Connection, question: VersionQuery) -> list[Version]:
    """The versions that fit, the best first where a metric is named, else by name and number.

    With a metric, the period is that in which it was measured, and only versions that were measured are found; else it
    is that in which they were trained. UsageError where scores of different suites would be compared.
    """
    if question.best and not question.metric:
        raise UsageError("best needs a metric", "--metric SUITE.METRIC names one, such as medqa.acc")
    limit = 1 if question.best else question.limit and min(question.limit, MOST_VERSIONS)
    if question.metric:
        return _read_in_order(connection, _ranked(connection, question)[:limit])
    query = select(versions).where(_condition(question)).order_by(versions.c.name, versions.c.number).limit(limit)
    return complete(connection, [dict(row) for row in connection.execute(query).mappings()])


def sum_of_rows(data: str | Path) -> str:
    """The sha256 of a file of rows, or the beginning of one that is named itself; UsageError for neither."""
    if data and Path(data).is_file():
        return str(digest(Path(data))["sha256"])
    if str(data).lower().strip("0123456789abcdef"):
        raise UsageError(f"--data {data}: no such file", "a file of rows, or the beginning of its sha256")
    return str(data).lower()


def unknown_words(connection: Connection, question: VersionQuery) -> list[str]:
    """What was looked for and no version has, a line each, with what is near it."""
    columns = {key: versions.c[key] for key in ("name", "domain", "task", "author")} | {"alias": aliases.c.alias}
    lines = []
    for key, column in columns.items():
        word = getattr(question, key)
        if word and word not in (known := list(connection.scalars(select(column).distinct()))):
            lines.append(f"no version has {key} {word!r}{did_you_mean(word, known)}")
    return lines


def _condition(question: VersionQuery) -> ColumnElement[bool]:
    terms = [parse_where(question.where)]
    for key in ("name", "domain", "task", "author"):
        if value := getattr(question, key):
            terms.append(versions.c[key] == value)
    if question.alias:
        pointed = (aliases.c.name == versions.c.name, aliases.c.number == versions.c.number)
        terms.append(select(aliases.c.number).where(*pointed, aliases.c.alias == question.alias).exists())
    if question.data_sha256:
        terms.append((" " + versions.c.data).contains(f" {question.data_sha256}", autoescape=True))
    if not question.metric:
        terms += [versions.c.created >= question.since] if question.since else []
        terms += [versions.c.created < question.until] if question.until else []
    return and_(*terms)


def _ranked(connection: Connection, question: VersionQuery) -> list[Key]:
    """The versions that were measured in the period, the best first, by the newest score of each."""
    suite, metric = metric_name(question.metric)
    terms = [scores.c.suite == suite, scores.c.metric == metric]
    terms += [scores.c.created >= question.since] if question.since else []
    terms += [scores.c.created < question.until] if question.until else []
    if question.suite_sha256:
        terms.append(scores.c.suite_sha256.startswith(question.suite_sha256, autoescape=True))
    joined = scores.join(versions, and_(scores.c.name == versions.c.name, scores.c.number == versions.c.number))
    columns = (scores.c[name] for name in ("name", "number", "value", "suite_sha256", "higher_is_better"))
    query = select(*columns).select_from(joined).where(*terms, _condition(question))
    newest = {(row.name, row.number, row.suite_sha256): row for row in connection.execute(query.order_by(*_AGE))}
    if not newest:
        _refuse_unknown_metric(connection, question)
    suites = sorted({row.suite_sha256 for row in newest.values()})
    if len(suites) > 1:
        raise UsageError(
            f"{question.metric}: measured on {len(suites)} different suites, whose scores are not comparable",
            f"--suite names one: {', '.join(sha256[:12] for sha256 in suites[:5])}",
        )
    ranked = [(-row.value if row.higher_is_better else row.value, row.name, -row.number) for row in newest.values()]
    return [(name, -number) for _, name, number in sorted(ranked)]


def _read_in_order(connection: Connection, keys: Sequence[Key]) -> list[Version]:
    found = {(version.name, version.number): version for version in read_versions(connection, keys)}
    return [found[key] for key in keys]


def _refuse_unknown_metric(connection: Connection, question: VersionQuery) -> None:
    suite, metric = metric_name(question.metric)
    known = [
        f"{row.suite}.{row.metric}" for row in connection.execute(select(scores.c.suite, scores.c.metric).distinct())
    ]
    if f"{suite}.{metric}" not in known:
        raise UsageError(
            f"--metric {question.metric}: no version was measured on it{did_you_mean(question.metric, known)}",
            f"measured: {', '.join(sorted(known)[:20])}" if known else "`lora2serve registry score` writes scores down",
        )


def run_sql(database: Database, statement: str) -> tuple[Sequence[str], list[list[object]]]:
    """Columns and rows of a query; UsageError for what it refuses, for whatever would write, and for too many rows."""
    with database.reading() as connection:
        if isinstance(own := connection.connection.dbapi_connection, sqlite3.Connection):
            own.set_authorizer(_reads_only)
            own.set_progress_handler(_no_reason_to_stop, STEPS)
        else:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        try:  # in Postgres a cursor of the server takes one query, and nothing else
            text = statement if isinstance(own, sqlite3.Connection) else statement.replace("%", "%%")  # no parameters
            result = connection.execution_options(stream_results=True).exec_driver_sql(text)
            if not result.returns_rows:
                raise UsageError("sql: expected a SELECT", READING)
            rows = result.fetchmany(MOST_ROWS + 1)
            if len(rows) > MOST_ROWS:
                raise UsageError(f"sql: more than {MOST_ROWS} rows", "LIMIT, WHERE or GROUP BY makes fewer of them")
            return list(result.keys()), [list(row) for row in rows]
        except DBAPIError as error:
            if isinstance(own, sqlite3.Connection) and str(error.orig) == "interrupted":
                raise KeyboardInterrupt from None
            raise UsageError(f"sql: {first_line(error.orig or error)}", READING) from None
        finally:
            if isinstance(own, sqlite3.Connection):
                own.set_authorizer(None)
                own.set_progress_handler(None, 0)


def _no_reason_to_stop() -> int:
    """Python looks for signals when it is called: Ctrl-C in it ends the query, which sqlite then calls interrupted."""
    return 0


def _reads_only(action: int, *names: str | None) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY
