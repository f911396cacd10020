"""What a sweep may change of a recipe, and one point of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import cast

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.config import recipe as recipes
from lora2serve.config.recipe import PRESETS
from lora2serve.config.schema import read_keys, show
from lora2serve.errors import RecipeError

RATE, TARGETS, RANK = "train.learning_rate", "train.lora.targets", "train.lora.rank"
ALPHA = "train.lora.alpha"
FIRST_RANK = 16  # of the ranks, the one nearest to it is that of the first phase
BETWEEN_RATES = 2.0  # the step where there is one rate
LEAST_RATE, LARGEST_RATE, LARGEST_RANK = 1e-7, 1.0, 512
HINT = f"keys are fields of a recipe with lists of values, such as `{RATE}: [2e-4, 4e-4]`"
# What the sweep itself sets, or what makes eval losses incomparable.
FIXED = (
    "method", "options", "steps", "epochs", "seed", "eval_steps", "early_stopping", "save_best", "samples",
    "log_interval", "trackers",
)  # fmt: skip

Value = str | int | float | bool | None | tuple[str, ...]
Others = tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class SearchPoint:
    """One way to train; ``targets`` is a preset, or names of modules with ``+`` between."""

    rate: float
    targets: str
    rank: int
    others: Others = ()  # further fields of the recipe

    @property
    def label(self) -> str:
        """``lr2e-3-qv-r8``: in names of runs, and the same for the same point everywhere."""
        names = self.targets if len(self.targets) <= 40 else _short_digest(self.targets)
        others = f"-{_short_digest(json.dumps(self.others))}" if self.others else ""
        return f"lr{show_rate(self.rate)}-{names.replace('+', '.')}-r{self.rank}{others}"

    @property
    def words(self) -> str:
        """As a sentence names it."""
        return f"rank {self.rank} on {self.targets} at {show_rate(self.rate)}{self._words_of_others}"

    @property
    def words_of_any_rate(self) -> str:
        """Of it and of those that differ in the learning rate alone."""
        return f"rank {self.rank} on {self.targets}{self._words_of_others}"

    @property
    def _words_of_others(self) -> str:
        return "".join(f", {key.removeprefix('train.')} {value}" for key, value in self.others)

    def overrides(self, alpha: float) -> dict[str, object]:
        """Fields of the recipe. ``alpha``: of each rank, so that a larger one is no larger step."""
        names = self.targets.split("+")
        targets = names if len(names) > 1 else self.targets
        scaled = {RATE: self.rate, TARGETS: targets, RANK: self.rank, ALPHA: alpha * self.rank}
        return scaled | {key: list(value) if isinstance(value, tuple) else value for key, value in self.others}


@dataclass(frozen=True)
class SearchSpace(JsonRecord):
    """Values to try, in order of size; ``others`` are further fields of the recipe with theirs."""

    WHOLE = True

    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
    targets: tuple[str, ...] = PRESETS
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    others: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    @property
    def first_rank(self) -> int:
        """That of the first phase: advice and measurements say 16."""
        return min(self.ranks, key=lambda rank: (abs(math.log2(rank / FIRST_RANK)), rank))

    def grid(self) -> list[SearchPoint]:
        """All points of the first phase, the middle rates first."""
        middle = math.log(self.rates[0] * self.rates[-1]) / 2
        rates = sorted(self.rates, key=lambda rate: (abs(math.log(rate) - middle), rate))
        others = [tuple(zip(self.others, values, strict=True)) for values in product(*self.others.values())]
        return [
            SearchPoint(rate, targets, self.first_rank, more)
            for rate, targets, more in product(rates, self.targets, others)
        ]

    def neighbors(self, rate: float) -> tuple[float, float]:
        """The next smaller and the next larger rate; beyond the ends of the range, one step further."""
        smaller, larger = [r for r in self.rates if r < rate], [r for r in self.rates if r > rate]
        below = smaller[-1] if smaller else _rounded(rate / self._step(self.rates[:2]))
        above = larger[0] if larger else _rounded(rate * self._step(self.rates[-2:]))
        return below, above

    def _step(self, pair: Sequence[float]) -> float:
        return pair[1] / pair[0] if len(pair) > 1 else BETWEEN_RATES


def show_rate(rate: float) -> str:
    """``2e-4``"""
    mantissa, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def read_space(path: Path | None, recipe: Path, overrides: Sequence[str]) -> SearchSpace:
    """The file of ``--space``, or the usual space; RecipeError with every problem. Each value must suit the recipe."""
    if path is None:
        return SearchSpace()
    content, problems = read_keys(path, HINT)
    values = {key: list(value) if isinstance(value, list) else [value] for key, value in content.items()}
    for key, items in values.items():
        own = list(_problems_of_key(key, items))
        problems += own or [text for item in items for text in _misfits(recipe, overrides, key, item)]
    if not content:
        problems.append("empty, expected fields of a recipe with lists of values")
    if problems:
        raise RecipeError("\n".join(f"{path.name}: {problem}" for problem in dict.fromkeys(problems)), HINT)
    usual = SearchSpace()
    return replace(
        usual,
        rates=tuple(sorted(float(str(item)) for item in values.pop(RATE, usual.rates))),
        targets=tuple(_joined(item) for item in values.pop(TARGETS, usual.targets)),
        ranks=tuple(sorted(int(str(item)) for item in values.pop(RANK, usual.ranks))),
        others={key: tuple(_frozen(item) for item in items) for key, items in values.items()},
    )


def _problems_of_key(key: str, items: Sequence[object]) -> Iterator[str]:
    section, _, name = key.partition(".")
    if section != "train" or not name:
        yield f"{key}: expected a field of `train`: with another model or other rows, losses do not compare"
    elif name in FIXED or key == ALPHA:
        why = "it grows with the rank" if key == ALPHA else "the sweep sets it"
        yield f"{key}: cannot be searched, {why}"
    if not items:
        yield f"{key}: an empty list"
    repeated = [item for number, item in enumerate(items) if item in items[:number]]
    yield from (f"{key}: {show(item)} given twice" for item in repeated)


def _misfits(recipe: Path, overrides: Sequence[str], key: str, value: object) -> Iterator[str]:
    """What the recipe says of that value."""
    try:
        recipes.load(recipe, [*overrides, f"{key}={json.dumps(value)}"])
    except RecipeError as error:
        yield from (line.removeprefix("--set ") for line in error.message.splitlines())


def _frozen(value: object) -> Value:
    """A value that the recipe takes, as a point holds it."""
    return cast("Value", tuple(value) if isinstance(value, list) else value)


def _joined(targets: object) -> str:
    return "+".join(map(str, targets)) if isinstance(targets, list) else str(targets)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
