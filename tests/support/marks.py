"""What ``-m`` may choose."""

from __future__ import annotations

from functools import cache
from itertools import chain, combinations

from _pytest.mark.expression import Expression

MARKS = ("engine", "slow", "gpu", "hub", "ollama")


@cache
def may_choose(mark: str, expression: str) -> bool:
    """Whether ``-m EXPRESSION`` takes a test that has this mark, and any others."""
    if not expression:
        return True
    chosen = Expression.compile(expression)
    others = [other for other in MARKS if other != mark]
    sets = chain.from_iterable(combinations(others, count) for count in range(len(MARKS)))
    return any(chosen.evaluate(lambda name, /, marks=(mark, *marks), **_: name in marks) for marks in sets)
