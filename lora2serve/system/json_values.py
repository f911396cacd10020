"""What JSON can hold, as a type, and a way into it that does not trust whoever wrote it."""

from __future__ import annotations

from typing import TypeAlias

JsonValue: TypeAlias = "dict[str, JsonValue] | list[JsonValue] | str | int | float | bool | None"
Json: TypeAlias = dict[str, JsonValue]


def at(value: JsonValue, *path: str | int) -> JsonValue:
    """``at(answer, "choices", 0, "text")``: what is there, or None where a step leads nowhere."""
    for step in path:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and -len(value) <= step < len(value):
            value = value[step]
        else:
            return None
    return value


def objects(value: JsonValue) -> list[Json]:
    """The objects in a list; nothing where it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
