"""How many examples hypothesis draws."""

from __future__ import annotations

from hypothesis import settings

USUAL = 100


def examples(many: int) -> int:
    """``many`` in `make test`; in `make check` the quarter that the profile ``light`` has of everything."""
    return max(2, many * settings.default.max_examples // USUAL)
