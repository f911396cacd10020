"""The rules by which a challenger is judged, as gateway.yaml has them under a route's ``decisions``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from lora2serve.config.bounds import Range

Measure = Literal["truth", "wins", "errors", "latency", "first-token"]
TIMES = ("latency", "first-token")  # in seconds, judged by a quantile


@dataclass(frozen=True)
class DecisionRule:
    """One thing that is measured of champion and challenger.

    ``measure``: truth (right answers, as feedback says), wins (which of two answers feedback prefers), errors (requests
    that failed), latency (seconds of a whole answer) or first-token (seconds to its first token).
    ``worse_by``: how much worse the challenger may be: a share of requests, or of the champion's time. 0.02 lets 90 %
    right answers become 88 %, 0.2 lets 1.0 s become 1.2 s.
    ``promote_within``: promote once it is worse by less than that; 0 where it must be better. Every rule that has it
    must say so; without it, the rule promotes nothing.
    ``quantile``: of the times, which one is compared: 0.9 is what 90 % of the requests stay below.
    """

    measure: Measure
    worse_by: Annotated[float, Range(0.0, 10.0)] = 0.0
    promote_within: Annotated[float | None, Range(0.0, 10.0)] = None
    quantile: Annotated[float, Range(0.5, 0.99)] = 0.9


@dataclass(frozen=True)
class DecisionRecipe:
    """When a challenger is stopped or promoted.

    ``false_alarms``: the probability that one that is not worse by any rule is ever stopped; and that one is ever
    promoted that is worse by more than a rule lets it. For all looks together.
    ``client_hours``: the requests of one client in that time count once: what one client asks is alike. 0 counts each.
    ``webhook``: a URL that gets the verdict as JSON.
    """

    rules: tuple[DecisionRule, ...] = ()
    false_alarms: Annotated[float, Range(0.0001, 0.5)] = 0.05
    client_hours: Annotated[float, Range(0.0, 10_000.0)] = 24.0
    webhook: str | None = None

    def problems(self, path: str) -> Iterator[str]:
        """What is wrong beside the types; ``path`` is where the section stands."""
        measures = [rule.measure for rule in self.rules]
        for number, rule in enumerate(self.rules):
            here = f"{path}.rules[{number}]"
            if rule.measure in measures[:number]:
                yield f"{here}.measure: {rule.measure!r} has a rule already"
            for key, value in (("worse_by", rule.worse_by), ("promote_within", rule.promote_within)):
                if rule.measure not in TIMES and value is not None and value >= 1:
                    yield f"{here}.{key}: {value:g}, expected less than 1: it is a share of requests"
        if self.webhook is not None:
            try:
                parts = urlsplit(self.webhook)
                fits = parts.scheme in ("http", "https") and bool(parts.hostname)
            except ValueError:
                fits = False
            if not fits:
                yield f"{path}.webhook: expected an address such as https://example.com/hook"
