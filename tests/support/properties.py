"""A property that hypothesis tries on a few examples in the light tests, and weekly on more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

Test = Callable[..., Any]


def tried(
    body: Callable[..., None], *how: Callable[[Callable[..., None]], Callable[..., None]], light: int, weekly: int
) -> tuple[Test, Test]:
    """Two tests of ``body``, for two names: ``how`` are hypothesis' decorators, the first of them next to it."""

    def test(examples: int) -> Test:
        made: Test = body
        for decorate in how:
            made = decorate(made)
        return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])(made)

    return test(light), pytest.mark.slow(test(weekly))
