"""All aliases at once, for whoever follows them: asked often, and answered by one number where nothing was done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from lora2serve.registry.alias_moves import numbers_before
from lora2serve.registry.tables import aliases, events, versions

# built once: to build a question takes longer than to answer it
_LAST = select(func.max(events.c.id))
_NAMES = select(versions.c.name).distinct()
_ALIASES = select(aliases)
_ACTIVE = select(versions.c.name, versions.c.number).where(versions.c.state == "active")  # facts are long
_MOVES = (
    select(events.c.name, events.c.alias, events.c.kind, events.c.new).where(events.c.alias != "").order_by(events.c.id)
)


@dataclass(frozen=True)
class LiveAliases:
    """Where aliases point, at one event."""

    event: int  # the last one that was written down
    numbers: Mapping[str, Mapping[str, int]]  # name -> alias -> number, of every name that has versions
    before: Mapping[str, Mapping[str, int]]  # the same of where a rollback would go, where it can go anywhere


def last_event(connection: Connection) -> int:
    """The number of the last event; 0 where there is none."""
    return int(connection.scalar(_LAST) or 0)


def read_live(connection: Connection) -> LiveAliases:
    """The state that this transaction sees."""
    numbers: dict[str, dict[str, int]] = {name: {} for name in connection.scalars(_NAMES)}
    for row in connection.execute(_ALIASES):
        numbers[row.name][row.alias] = row.number
    moves: dict[tuple[str, str], list[tuple[str, int | None]]] = defaultdict(list)
    for row in connection.execute(_MOVES):
        moves[row.name, row.alias].append((row.kind, row.new))
    active = {(row.name, row.number) for row in connection.execute(_ACTIVE)}
    before: dict[str, dict[str, int]] = defaultdict(dict)
    for (name, alias), own in moves.items():
        earlier = next((number for number in numbers_before(own) if (name, number) in active), None)
        if earlier is not None and alias in numbers.get(name, {}):
            before[name][alias] = earlier
    return LiveAliases(last_event(connection), numbers, dict(before))
