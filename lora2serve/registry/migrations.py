"""The schema of a registry by its number, and the steps from each to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, select

from lora2serve.config.schema import show
from lora2serve.errors import InputError
from lora2serve.registry.tables import SCHEMA, settings, versions
from lora2serve.registry.version_facts import VersionFacts, data_sums

if TYPE_CHECKING:
    from lora2serve.registry.database import Database


def _add_data(connection: Connection) -> None:
    """2: versions are found by the rows that they were trained on."""
    connection.exec_driver_sql("ALTER TABLE version ADD COLUMN data TEXT NOT NULL DEFAULT ''")
    for row in connection.execute(select(versions.c.name, versions.c.number, versions.c.facts)).all():
        sums = data_sums(VersionFacts.from_text(row.facts, f"{row.name}@{row.number}: facts"))
        same = (versions.c.name == row.name, versions.c.number == row.number)
        connection.execute(versions.update().where(*same).values(data=sums))


STEPS: Mapping[int, Callable[[Connection], None]] = {1: _add_data}  # from which schema -> what makes the next one of it


def schema_of(database: Database) -> int | None:
    """The number of its schema; None where it has no tables yet."""
    with database.reading() as connection:
        return read_schema(connection)


def read_schema(connection: Connection) -> int | None:
    """As ``schema_of``, in a transaction."""
    if not inspect(connection).has_table("setting"):
        return None
    value = connection.scalar(select(settings.c.value).where(settings.c.key == "schema"))
    if value and not value.isdecimal():
        raise InputError(f"registry: schema {show(value)}, expected a number", "the file is damaged: bring back a copy")
    return int(value) if value else None


def migrate(database: Database) -> None:
    """Bring an older registry to this schema, all steps in one transaction."""
    with database.writing() as connection:
        for number in range(read_schema(connection) or SCHEMA, SCHEMA):  # nothing, where another process was faster
            STEPS[number](connection)
        connection.execute(settings.update().where(settings.c.key == "schema").values(value=str(SCHEMA)))
