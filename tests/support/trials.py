"""Trials in tests: what a gateway's decisions read and write, on a registry and a store of records in one folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora2serve import Registry
from lora2serve.gateway.decisions.decision_rules import DecisionRecipe, DecisionRule
from lora2serve.gateway.decisions.trial_store import TrialStore
from lora2serve.gateway.decisions.verdicts import DecisionMaker, TrialPlan
from lora2serve.gateway.request_record import RequestRecord
from lora2serve.gateway.traffic_store import TrafficStore

NAME, ALIASES = "medical-qa", ("champion", "challenger")


class Heard:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.note = self.warn = self.lines.append


def plan(*rules: DecisionRule, mode: str = "split", challenger: int = 2, **settings: object) -> list[TrialPlan]:
    recipe = DecisionRecipe(rules=rules or (DecisionRule("truth"),), **settings)  # type: ignore[arg-type]
    return [TrialPlan(NAME, 1, challenger, mode, 0.5, recipe, ALIASES)]  # type: ignore[arg-type]


def maker(place: Path, plans: list[TrialPlan], heard: Heard | None = None, states: str = "states") -> DecisionMaker:
    @contextmanager
    def registry() -> Iterator[Registry]:
        with Registry(place / "registry", author="gateway") as opened:
            yield opened

    made = DecisionMaker(registry, TrafficStore(place), TrialStore(place / states), heard or Heard())  # type: ignore[arg-type]
    made.plan(plans)
    return made


def request(number: int, arm: str, version: int, **values: object) -> RequestRecord:
    usual = {
        "request_id": f"r{number}", "at": float(number), "name": NAME, "version": version, "arm": arm,
        "upstream": "prod", "unit": f"u{number}", "path": "/v1/chat/completions", "status": 200,
    }  # fmt: skip
    return RequestRecord(**{**usual, **values})  # type: ignore[arg-type]


def moves(place: Path) -> list[tuple[str, str, int | None]]:
    with Registry(place / "registry") as registry:
        return [(e.kind, e.alias, e.new) for e in registry.history(NAME) if e.alias and e.who == "gateway"]
