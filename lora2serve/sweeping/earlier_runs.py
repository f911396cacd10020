"""Earlier runs and sweeps of the same base, as far as they say where to begin: those whose data are near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora2serve.api.version_registry import Registry
from lora2serve.artifacts import run as runs
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import TrainRecipe
from lora2serve.config.schema import build, read_keys
from lora2serve.errors import Lora2ServeError
from lora2serve.registry.location import find_location
from lora2serve.sweeping.data_likeness import NEAR, DataFigures, figures_of_file
from lora2serve.sweeping.search_space import RANK, RATE, TARGETS, SearchPoint, SearchSpace
from lora2serve.sweeping.sweep_report import SweepReport
from lora2serve.sweeping.trial_files import ROOT

MOST_VERSIONS = 20  # of a registry, the newest
MOST_POINTS = 4  # that a sweep begins with


@dataclass(frozen=True)
class EarlierRun:
    """What was good on other data: ``points`` of a run or of a sweep's front, and how far its data are away."""

    name: str
    points: tuple[SearchPoint, ...]
    distance: float

    @property
    def near(self) -> bool:
        """Whether its data are like these."""
        return self.distance <= NEAR

    @property
    def words(self) -> str:
        """In a sentence."""
        points = ", ".join(point.words for point in self.points)
        return f"{self.name} ({'near' if self.near else 'far'}, distance {self.distance:.2f}): {points}"


def earlier_runs(base: BaseRecord, figures: DataFigures) -> list[EarlierRun]:
    """Those of this folder and of the registry, the nearest first."""
    found = [*_sweeps(base, figures), *(e for name, run in _runs() if (e := _of_run(name, run, base, figures)))]
    return sorted(found, key=lambda earlier: (earlier.distance, earlier.name))


def may_be_earlier() -> bool:
    """Whether there is anything to look at."""
    here = any(runs.ROOT.glob("*/run.json")) or any(ROOT.glob("*/front.json"))
    location = find_location()
    return here or location.folder is None or location.file.is_file()


def first_points(earlier: Sequence[EarlierRun], space: SearchSpace) -> list[SearchPoint]:
    """What a sweep tries first: rates and layers of those that are near, at its own first rank."""
    points = [
        SearchPoint(point.rate, point.targets, space.first_rank, tuple((k, v[0]) for k, v in space.others.items()))
        for run in earlier
        if run.near
        for point in run.points
        if point.targets in space.targets
    ]
    return list(dict.fromkeys(points))[:MOST_POINTS]


def _runs() -> Iterator[tuple[str, Run]]:
    """Finished runs by name: under ``runs/``, and versions of the registry that is here."""
    for path in sorted(runs.ROOT.glob("*/run.json")):
        if not path.parent.is_symlink():
            yield path.parent.as_posix(), Run(path.parent)
    location = find_location()
    if location.folder is not None and not location.file.is_file():
        return
    with Registry() as registry:
        newest = sorted(registry.versions(), key=lambda version: version.added, reverse=True)[:MOST_VERSIONS]
        for version in newest:
            if version.state == "active" and version.run:
                yield version.reference, Run(registry.path(version.reference))


def _of_run(name: str, run: Run, base: BaseRecord, figures: DataFigures) -> EarlierRun | None:
    """None for what is not finished, is of another base, or does not say enough."""
    with suppress(Lora2ServeError, OSError, ValueError):
        record = run.record
        if not record.finished or not _same_base(record.base, base) or not run.eval_data.is_file():
            return None
        known = record.metrics.base
        own = figures_of_file(run.eval_data.read_text(encoding="utf-8"), known.eval_loss if known else None)
        content, _ = read_keys(run.recipe, "")
        train = build(TrainRecipe, content.get("train"), [])
        if train.method != "lora":
            return None
        targets = train.lora.targets if isinstance(train.lora.targets, str) else "+".join(train.lora.targets)
        return EarlierRun(name, (SearchPoint(train.learning_rate, targets, train.lora.rank),), figures.distance(own))
    return None


def _sweeps(base: BaseRecord, figures: DataFigures) -> Iterator[EarlierRun]:
    for path in sorted(ROOT.glob("*/front.json")):
        with suppress(Lora2ServeError, OSError, ValueError):
            report = SweepReport.from_text(path.read_text(encoding="utf-8"), str(path))
            first = Run(Path(report.recommended.run)).record.base
            points = tuple(point for line in report.finals if (point := _point(line.settings)))
            if points and _same_base(first, base):
                yield EarlierRun(path.parent.as_posix(), points, figures.distance(report.figures))


def _point(settings: object) -> SearchPoint | None:
    if not isinstance(settings, dict):
        return None
    rate, targets, rank = settings.get(RATE), settings.get(TARGETS), settings.get(RANK)
    targets = "+".join(targets) if isinstance(targets, list | tuple) else targets
    if isinstance(rate, int | float) and isinstance(targets, str) and isinstance(rank, int):
        return SearchPoint(float(rate), targets, rank)
    return None


def _same_base(one: BaseRecord, other: BaseRecord) -> bool:
    """Whether both are of the same shape and configuration."""
    return one.fingerprint == other.fingerprint and one.fingerprint.tensors is not None
