"""The folder of a sweep, and how a trial's recipe follows from the sweep's.

sweeps/<name>/sweep.db         Optuna's storage, unless another was named
              recipe.yaml      what is trained, with the rows below
              rows/            all.jsonl, subset.jsonl, search.jsonl and final.jsonl: fixed for all trials
              runs/            one run for each trial
              front.json       all trials, the front, what is recommended
              report.html      the same as a page
              recommended.yaml a recipe
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.config.recipe import Recipe, TrainRecipe, dump
from lora2serve.data.data_sets import DataSets
from lora2serve.data.rows import Row
from lora2serve.errors import UsageError
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.trial_record import FULL, TrialSpec
from lora2serve.system.small_files import digest

ROOT = Path("sweeps")
MOST_SEARCH_ROWS = 500  # held-out rows that each trial is measured on
FEWEST_HELD_OUT = 4


@dataclass(frozen=True)
class TrialFiles:
    """Paths of one sweep."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def all_rows(self) -> Path:
        return self.folder / "rows" / "all.jsonl"

    @property
    def subset(self) -> Path:
        return self.folder / "rows" / "subset.jsonl"

    @property
    def search_rows(self) -> Path:
        return self.folder / "rows" / "search.jsonl"

    @property
    def final_rows(self) -> Path:
        return self.folder / "rows" / "final.jsonl"

    @property
    def front(self) -> Path:
        return self.folder / "front.json"

    @property
    def page(self) -> Path:
        return self.folder / "report.html"

    @property
    def recommended(self) -> Path:
        return self.folder / "recommended.yaml"

    def run(self, spec: TrialSpec) -> Path:
        """Where a trial's run is."""
        return self.folder / "runs" / spec.key

    def write(self, recipe: Recipe, sets: DataSets, fraction: float) -> dict[str, str]:
        """The rows and the recipe; the sha256 of each file of rows. Without held-out rows a suite is what judges."""
        rows = {self.all_rows: sets.train.rows}
        if sets.held_out:
            rows[self.search_rows], rows[self.final_rows] = split_held_out(sets)
        if fraction < 1:
            rows[self.subset] = _some(sets.train.rows, fraction)
        for path, content in rows.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, content)
        data = replace(
            recipe.data, train=str(self.subset if fraction < 1 else self.all_rows),
            eval=str(self.search_rows) if sets.held_out else None, eval_split=None, split=DataRecipe.split, subset=None,
            columns={},
        )  # fmt: skip
        self.recipe.write_text(dump(replace(recipe, data=data)), encoding="utf-8")
        return {path.name: digest(path)["sha256"] for path in rows}


def trial_overrides(
    spec: TrialSpec, train: TrainRecipe, settings: SearchSettings, files: TrialFiles, fraction: float
) -> list[str]:
    """``KEY=VALUE`` for the sweep's own recipe, whose section ``train`` is given."""
    values = spec.point.overrides(settings.alpha_per_rank) | {"train.seed": spec.seed, "name": spec.key}
    if spec.level == FULL:
        values["data.train"] = str(files.all_rows)
    else:
        share = settings.shares[spec.level]
        scale = share * (fraction if train.steps is not None else 1.0)
        if train.steps is not None:
            values["train.steps"] = max(1, round(train.steps * scale))
        else:
            values["train.epochs"] = train.epochs * share
        if train.eval_steps is not None:
            values["train.eval_steps"] = max(1, round(train.eval_steps * share * fraction))
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def split_held_out(sets: DataSets) -> tuple[list[Row], list[Row]]:
    """Rows for the search, and as many or more that are unseen to the end; UsageError where there are too few."""
    if sets.held_out is None:
        hint = "set data.eval_split: 0.1, or data.eval; or judge by a suite (--suite)"
        raise UsageError("the recipe holds no rows out, by which a sweep could judge", hint)
    rows = sets.held_out.rows
    keys = [json.dumps(row.json()) for row in rows]
    if len(set(keys)) < FEWEST_HELD_OUT:
        raise UsageError(
            f"{len(set(keys))} different held-out rows, expected {FEWEST_HELD_OUT} at least",
            "raise data.eval_split, or add rows",
        )
    search, final = halves(keys)
    return [rows[number] for number in search], [rows[number] for number in final]


def halves(keys: Sequence[str], most: int = MOST_SEARCH_ROWS) -> tuple[list[int], list[int]]:
    """The numbers of those for the search, and of those that stay unseen; what has the same key stays together."""
    together: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        together.setdefault(key, []).append(number)
    units, search = list(together.values()), list[int]()
    random.Random(0).shuffle(units)
    most = min(most, len(keys) // 2)
    for unit in units:
        search += unit if len(search) + len(unit) <= most else []
    return sorted(search), sorted(set(range(len(keys))) - set(search))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """As JSON Lines."""
    lines = (json.dumps(row.json(), ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _some(rows: Sequence[Row], fraction: float) -> list[Row]:
    """A fixed share of the rows, in their order."""
    count = max(1, round(len(rows) * fraction))
    return [rows[number] for number in sorted(random.Random(0).sample(range(len(rows)), count))]
