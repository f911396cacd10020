"""Bounds of a recipe's fields, written beside the type: ``rank: Annotated[int, Range(1, 1 << 14)] = 16``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Bound(Protocol):
    """What a value of the right type must meet, too."""

    def problem(self, value: object) -> str:
        """What was expected instead of ``value``; empty where it is met."""
        ...


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, both included. Holds for numbers; what is no number in a union passes."""

    low: float
    high: float

    def problem(self, value: object) -> str:
        inside = not isinstance(value, int | float) or self.low <= value <= self.high
        return "" if inside else f"expected {self.low} to {self.high}"


@dataclass(frozen=True)
class Positive:
    """More than zero, and at most ``high``."""

    high: float

    def problem(self, value: object) -> str:
        inside = not isinstance(value, int | float) or 0 < value <= self.high
        return "" if inside else f"expected more than 0 and at most {self.high:g}"


@dataclass(frozen=True)
class NotEmpty:
    """A text of at least one character, or a list of at least one item."""

    what: str

    def problem(self, value: object) -> str:
        return f"expected {self.what}" if value in ("", ()) else ""


@dataclass(frozen=True)
class Untaken:
    """A choice that earlier releases or others have, and the Literal has not; ``reason`` says what is expected."""

    choice: str
    reason: str
