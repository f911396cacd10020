"""One text near the model's length, of whose end is asked: what shows only there, as rope scaling and windows do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice

TAIL = 128  # positions at the end that are compared
SHARE = 4  # of the text the tail is at most one in


@dataclass(frozen=True)
class LongText:
    """``ids``, of which the last ``tail`` positions are compared; ``context`` is the model's, None without a limit."""

    ids: tuple[int, ...]
    tail: int
    context: int | None

    @property
    def whole(self) -> bool:
        """Whether it fills the context."""
        return self.context is not None and len(self.ids) + 1 >= self.context


def make_long(texts: Sequence[Sequence[int]], most: int, context: int | None) -> LongText | None:
    """Those texts one after another, again where they end, up to ``most`` tokens and the model's context.

    Its end is its beginning once more: what a model knows of it, it knows from far away. None where no text is that
    long.
    """
    length = min(most, context - 1) if context else most  # engines want room for one token more
    tail = min(TAIL, length // SHARE)
    if not tail:
        return None
    ids = list(islice(chain.from_iterable(cycle(texts)), length - tail))
    return LongText((*ids, *ids[:tail]), tail, context)
