"""A ``Progress`` for tests; no library is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora2serve.progress import Unit


class Told:
    """A ``Progress`` that keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.bars: dict[str, list[int]] = {}
        self.said: dict[str, str] = {}  # beside a bar, the last word

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def track(self, label: str, total: int, unit: Unit = "") -> Iterator[Any]:
        self.bars[label] = [0, total]

        def advance(amount: int, status: str = "") -> None:
            self.bars[label][0] += amount
            self.said[label] = status or self.said.get(label, "")

        yield advance
