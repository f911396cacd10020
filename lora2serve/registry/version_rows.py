"""Versions out of the tables and into them: rows to typed values, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from sqlalchemy import Connection, Select, Table, and_, bindparam, or_, select

from lora2serve.errors import UsageError, did_you_mean
from lora2serve.registry.tables import aliases, events, exports, scores, versions
from lora2serve.registry.version_facts import VersionFacts
from lora2serve.registry.version_record import RegistryEvent, Version
from lora2serve.registry.version_reference import VersionReference

Key = tuple[str, int]
SOME = 500  # versions whose parts are read by one query
EXPORT = {"name": "label", "target": "target", "quant": "quant", "bytes": "bytes", "unproven": "unproven"}
SCORE = {
    name: name
    for name in (
        "suite", "metric", "created", "value", "low", "high", "n", "higher_is_better", "suite_sha256", "engine",
    )
}  # fmt: skip
# built once: to build a question takes longer than to answer it
_ALIAS = select(aliases.c.number).where(aliases.c.name == bindparam("name"), aliases.c.alias == bindparam("alias"))
_ALIASES = (
    select(aliases.c.alias, aliases.c.number).where(aliases.c.name == bindparam("name")).order_by(aliases.c.alias)
)
_NAMES = select(versions.c.name).distinct().order_by(versions.c.name)


def read_versions(connection: Connection, keys: Sequence[Key]) -> list[Version]:
    """Those versions, in any order."""
    rows: list[dict[str, object]] = []
    for numbers in _portions(keys):
        query = _query(versions, tuple(versions.c.keys()), (), len(numbers))
        rows += [dict(row) for row in connection.execute(query, _parameters(numbers)).mappings()]
    return complete(connection, rows)


def complete(connection: Connection, rows: Sequence[Mapping[str, object]]) -> list[Version]:
    """Rows of ``version``, in their order, with what the other tables have on them."""
    keys = [_key(row) for row in rows]
    named = _grouped(connection, keys, aliases, {"alias": "alias"}, ("alias",))
    exported = _grouped(connection, keys, exports, EXPORT, ("label",))
    measured = _grouped(connection, keys, scores, SCORE, ("suite", "metric", "created", "id"))
    return [
        _version(
            row,
            aliases=[part["alias"] for part in named[key]],
            exports=exported[key],
            scores=measured[key],
        )
        for row, key in zip(rows, keys, strict=True)
    ]


def find_version(connection: Connection, reference: VersionReference) -> Version:
    """The version that is meant; UsageError where there is none, with those that are near."""
    number = reference.number
    if reference.alias:
        number = connection.scalar(_ALIAS, {"name": reference.name, "alias": reference.alias})
    found = read_versions(connection, [(reference.name, number)]) if number is not None and number < 1 << 31 else []
    if not found:
        raise _unknown(connection, reference)
    return found[0]


def with_aliases(connection: Connection, version: Version) -> Version:
    """A version that was read in this transaction, of which no more than its aliases has changed since."""
    pointed = aliases_of(connection, version.name)
    return replace(version, aliases=tuple(alias for alias, number in pointed.items() if number == version.number))


def names(connection: Connection) -> list[str]:
    """Every name that has versions."""
    return list(connection.scalars(_NAMES))


def read_events(connection: Connection, name: str | None, after: int = 0) -> list[RegistryEvent]:
    """Those of one name, or all, the first first; only those after the one of that number."""
    query = select(events).where(events.c.id > after).order_by(events.c.id)
    rows = connection.execute(query.where(events.c.name == name) if name is not None else query).mappings()
    return [RegistryEvent.from_json(dict(row), f"event {row['id']}") for row in rows]


def aliases_of(connection: Connection, name: str) -> dict[str, int]:
    """Alias -> number."""
    return {row.alias: row.number for row in connection.execute(_ALIASES, {"name": name})}


def refuse_unknown_name(connection: Connection, name: str) -> None:
    """UsageError where no version has that name."""
    known = names(connection)
    if name not in known:
        raise UsageError(
            f"{name}: no versions of that name{did_you_mean(name, known)}",
            f"known names: {', '.join(known[:20])}" if known else "`lora2serve registry add` makes the first version",
        )


def _unknown(connection: Connection, reference: VersionReference) -> UsageError:
    refuse_unknown_name(connection, reference.name)
    if reference.alias:
        known = aliases_of(connection, reference.name)
        near = did_you_mean(reference.alias, known)
        hint = f"{reference.name} has: {', '.join(known)}" if known else "`lora2serve registry promote` sets one"
        return UsageError(f"{reference}: no such alias{near}", hint)
    numbers = list(connection.scalars(select(versions.c.number).where(versions.c.name == reference.name)))
    return UsageError(f"{reference}: no such version", f"{reference.name} has 1 to {max(numbers)}")


def _key(row: Mapping[str, object]) -> Key:
    return str(row["name"]), int(str(row["number"]))


def _grouped(
    connection: Connection, keys: Sequence[Key], table: Table, columns: Mapping[str, str], order: Sequence[str]
) -> Mapping[Key, list[dict[str, object]]]:
    """The rows of one table by their version, the columns under their names in the result."""
    found: dict[Key, list[dict[str, object]]] = defaultdict(list)
    for numbers in _portions(keys):
        query = _query(table, ("name", "number", *columns.values()), tuple(order), len(numbers))
        for row in connection.execute(query, _parameters(numbers)):
            found[str(row[0]), int(str(row[1]))].append(dict(zip(columns, row[2:], strict=True)))
    return found


def _portions(keys: Sequence[Key]) -> Iterator[Mapping[str, list[int]]]:
    """Those versions by their names, some of them at a time."""
    for start in range(0, len(keys), SOME):
        numbers: dict[str, list[int]] = defaultdict(list)
        for name, number in keys[start : start + SOME]:
            numbers[name].append(number)
        yield numbers


@lru_cache(maxsize=64)
def _query(table: Table, columns: tuple[str, ...], order: tuple[str, ...], names: int) -> Select[*tuple[object, ...]]:
    """The rows of versions that ``_parameters`` names, of so many names."""
    wanted = (
        and_(table.c.name == bindparam(f"name{n}"), table.c.number.in_(bindparam(f"numbers{n}", expanding=True)))
        for n in range(names)
    )
    return select(*(table.c[name] for name in columns)).where(or_(*wanted)).order_by(*(table.c[name] for name in order))


def _parameters(numbers: Mapping[str, list[int]]) -> Mapping[str, object]:
    pairs = tuple(enumerate(numbers.items()))
    return {f"name{n}": name for n, (name, _) in pairs} | {f"numbers{n}": some for n, (_, some) in pairs}


def _version(row: Mapping[str, object], **parts: object) -> Version:
    source = f"{row['name']}@{row['number']}"
    facts = VersionFacts.from_text(str(row["facts"]), f"{source}: facts")
    columns = {key: value for key, value in row.items() if key not in ("facts", "data")}
    lineage: dict[str, object] = {
        "targets": facts.targets, "data_sha256": str(row["data"]).split(), "data": facts.data.to_json(),
        "recipe": facts.recipe, "versions": facts.versions,
    }  # fmt: skip
    return Version.from_json({**columns, **parts, **lineage}, source)
