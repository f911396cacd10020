"""Aliases: forward through gates, and back to what they pointed to before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, select

from lora2serve.errors import GateNotMet, UsageError
from lora2serve.registry.ledger import Ledger
from lora2serve.registry.promotion_gates import GateRecipe, judged
from lora2serve.registry.tables import events
from lora2serve.registry.version_record import Version
from lora2serve.registry.version_reference import VersionReference, refuse_alias
from lora2serve.registry.version_rows import aliases_of, find_version, with_aliases


def promote(
    ledger: Ledger, reference: VersionReference, alias: str, gates: GateRecipe, *, force: bool, why: str
) -> Version:
    """Let ``alias`` point to a version; GateNotMet with every gate that forbids it, unless forced."""
    refuse_alias(alias)
    if force and not why.strip():
        raise UsageError("--force without --why", "--why says why the gates do not count: it is written down")
    version = find_version(ledger.connection, reference)
    _refuse_without_files(version)
    pointed = aliases_of(ledger.connection, version.name).get(alias)
    champion = find_version(ledger.connection, VersionReference(version.name, pointed)) if pointed else None
    asked = judged(version, champion, gates)
    ledger.gates.extend(asked)
    problems = [f"{one.gate}: {one.reason}" for one in asked if not one.met]
    if problems and not force:
        lines = [f"{version.reference} cannot become {alias}: {problem}" for problem in problems]
        raise GateNotMet("\n".join(lines), "--force --why REASON goes past the gates, and is written down")
    ledger.move("promote", version.name, alias, version.number, why=why, overridden="; ".join(problems))
    return with_aliases(ledger.connection, version)


def rollback(ledger: Ledger, name: str, alias: str, number: int | None, *, why: str) -> Version:
    """Let ``alias`` point to the version before, or to that number; retired ones are passed over.

    UsageError where there is none to go back to.
    """
    refuse_alias(alias)
    pointed = find_version(ledger.connection, VersionReference(name, alias=alias))
    if number is not None:
        version = find_version(ledger.connection, VersionReference(name, number))
        if version.state == "retired":
            raise UsageError(f"{version.reference}: retired", f"`lora2serve registry history {name}` says why")
    else:
        numbers = _before(ledger.connection, name, alias)
        earlier = (find_version(ledger.connection, VersionReference(name, each)) for each in numbers)
        found = next((each for each in earlier if each.state == "active"), None)
        if found is None:
            raise UsageError(
                f"{name}@{alias}: points to {pointed.number}, and no version before it can be gone back to",
                "`lora2serve registry promote` sets it to any version",
            )
        version = found
    _refuse_without_files(version)
    ledger.move("rollback", name, alias, version.number, why=why)
    return with_aliases(ledger.connection, version)


def unset(ledger: Ledger, reference: VersionReference, why: str) -> Version:
    """Remove an alias; the version that it pointed to."""
    if not reference.alias:
        raise UsageError(f"{reference}: expected NAME@ALIAS", "such as medical-qa@challenger")
    version = find_version(ledger.connection, reference)
    ledger.unset(version.name, reference.alias, why=why)
    return with_aliases(ledger.connection, version)


def retire(ledger: Ledger, reference: VersionReference, why: str) -> Version:
    """Mark a version as one that no alias may point to; UsageError where one does."""
    version = find_version(ledger.connection, reference)
    if version.aliases:
        raise UsageError(
            f"{version.reference}: {', '.join(version.aliases)} points to it",
            "`lora2serve registry promote` another version first, or `lora2serve registry rollback`",
        )
    if version.state == "active":
        ledger.retire(version.name, version.number, why)
    return find_version(ledger.connection, VersionReference(version.name, version.number))


def _before(connection: Connection, name: str, alias: str) -> Sequence[int]:
    query = select(events.c.kind, events.c.new).where(events.c.name == name, events.c.alias == alias)
    return numbers_before([(row.kind, row.new) for row in connection.execute(query.order_by(events.c.id))])


def numbers_before(moves: Iterable[tuple[str, int | None]]) -> Sequence[int]:
    """What an alias pointed to, the last first, without what was rolled back: a second rollback goes one further.

    moves: the kind and the new number of each of its events, in their order.
    """
    stack: list[int] = []
    for kind, new in moves:
        if kind == "rollback" and new in stack:
            while stack[-1] != new:
                stack.pop()
        elif new is not None and (not stack or stack[-1] != new):
            stack.append(new)
    return stack[-2::-1] if len(stack) > 1 else []


def _refuse_without_files(version: Version) -> None:
    if version.state == "collected":
        raise UsageError(
            f"{version.reference}: its files were removed by `lora2serve registry gc`",
            "`lora2serve registry add` of the same content brings them back",
        )
