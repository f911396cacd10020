"""A sweep whose trials are not trained but planted: its storage, its workers and its loop are the real ones."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.config.recipe import DataRecipe, ModelRecipe, Recipe, dump
from lora2serve.planning.gpus import GpuModel
from lora2serve.progress import Silent
from lora2serve.sweeping.search_plan import SearchPlan
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.search_space import SearchPoint, SearchSpace
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_loop import SweepLoop
from lora2serve.sweeping.trial_files import TrialFiles
from lora2serve.sweeping.trial_ledger import create_ledger, open_ledger
from lora2serve.sweeping.trial_plans import TrialPlanner
from lora2serve.sweeping.trial_process import TrialOrder
from lora2serve.sweeping.trial_record import FULL, RowLoss, TrialOutcome, TrialSpec
from tests.sweeping.simulated_search import BASE_LOSS, ROWS, TOKENS, PlantedLoss

SPACE = SearchSpace(rates=(1e-4, 2e-4, 4e-4), targets=("qv", "all-linear"), ranks=(8, 16))
BASE = RowLoss((BASE_LOSS * TOKENS,) * ROWS, (TOKENS,) * ROWS)
FORK = multiprocessing.get_context("fork")


@dataclass
class PlantedPlace:
    """Trials that sleep for a while; each that begins is a line of ``log``."""

    log: Path
    seconds: float = 0.0
    planted: PlantedLoss = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.planted = PlantedLoss(2e-4, "all-linear", 16, for_targets=0.05)

    def run(self, order: TrialOrder) -> TrialOutcome:
        with self.log.open("a") as file:
            file.write(f"{Path(order['run']).name}\n")
        time.sleep(self.seconds)
        return self.planted.outcome(spec_of(order))

    def measure(self, recipe: Path, base: Path, files: Sequence[Path], suites: Sequence[object] = ()) -> list[RowLoss]:
        return [BASE for _ in (*files, *suites)]

    def stop(self) -> None: ...

    def close(self) -> None: ...


def spec_of(order: TrialOrder) -> TrialSpec:
    """The trial that an order is for."""
    values: dict[str, Any] = {key: json.loads(text) for key, _, text in (o.partition("=") for o in order["overrides"])}
    point = SearchPoint(values["train.learning_rate"], values["train.lora.targets"], values["train.lora.rank"])
    level = re.search(r"-rung(\d)-", order["run"])
    return TrialSpec(point, int(level[1]) if level else FULL, values["train.seed"])


def begin(folder: Path, location: str = "", **changes: Any) -> SweepFacts:
    """A sweep that was begun, and has no trial yet; without a location it has no storage."""
    files = TrialFiles(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(ModelRecipe("base"), DataRecipe("train.jsonl"), "planted")
    files.recipe.write_text(dump(recipe))
    facts = SweepFacts(
        name=folder.name, folder=str(folder), recipe=dump(recipe), recipe_name="planted", question="", steps=900,
        fraction=1.0, rows=100, all_rows=100, search_rows=ROWS, final_rows=ROWS, rows_sha256={}, space=SPACE,
        settings=SearchSettings(base_loss=BASE_LOSS), base_search=BASE, base_final=BASE, gpu="",
    )  # fmt: skip
    facts = replace(facts, **changes)
    if location:
        create_ledger(location, facts)
    return facts


def work(location: str, log: Path, seconds: float = 0.0, jobs: int = 1) -> SearchPlan:
    """One worker, from where the sweep is to its end."""
    ledger = open_ledger(location)
    loss = EvalLoss(BASE_LOSS, 1.0, 1)
    planner = TrialPlanner(None, GpuModel("none", 1), 1.0)
    place = PlantedPlace(log, seconds)
    files = TrialFiles(Path(ledger.facts.folder))
    return SweepLoop(ledger, files, planner, place, Path("base"), loss, jobs, Silent()).run()


def process(location: str, log: Path, seconds: float, jobs: int = 1) -> Any:
    """The same in a process of its own."""
    child = FORK.Process(target=work, args=(location, log, seconds, jobs))
    child.start()
    return child


def begun(log: Path) -> list[str]:
    """Names of the trials that were begun, in their order."""
    return log.read_text().split() if log.exists() else []
