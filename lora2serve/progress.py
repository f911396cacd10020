"""How long work speaks: the caller hands one of these in, so that only the command line prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, runtime_checkable

Unit = Literal["", "bytes", "steps", "tokens"]


class Advance(Protocol):
    """Moves a bar; ``status`` is shown beside it until the next one."""

    def __call__(self, amount: int, status: str = "") -> None: ...


@runtime_checkable
class Progress(Protocol):
    """Words and bars of a long piece of work."""

    def note(self, text: str) -> None:
        """One line of information."""
        ...

    def warn(self, text: str) -> None:
        """One line that the user should act on."""
        ...

    def track(self, label: str, total: int, unit: Unit = "") -> AbstractContextManager[Advance]:
        """``with progress.track("fold", n, "bytes") as advance: advance(k)``; ``advance`` is thread-safe."""
        ...


class Silent:
    """Says nothing; for callers that are programs."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    @contextmanager
    def track(self, label: str, total: int, unit: Unit = "") -> Iterator[Advance]:
        yield lambda amount, status="": None
