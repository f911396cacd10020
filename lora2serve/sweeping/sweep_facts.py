"""What every worker of a sweep must know: kept in its storage, so that another machine needs only that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.sweeping.data_likeness import DataFigures
from lora2serve.sweeping.search_settings import SearchSettings
from lora2serve.sweeping.search_space import SearchSpace
from lora2serve.sweeping.sweep_quality import Quality
from lora2serve.sweeping.trial_record import RowLoss


@dataclass(frozen=True)
class SweepFacts(JsonRecord):
    """``question`` is by what a sweep is known again: the same recipe, space, rows, fraction, margin and budget."""

    WHOLE: ClassVar[bool] = True

    name: str
    folder: str  # absolute
    recipe: str  # YAML, fully resolved
    recipe_name: str  # as it was named
    question: str  # sha256
    steps: int  # of the recipe
    fraction: float
    rows: int  # that the search trains on
    all_rows: int
    search_rows: int  # held out, for the search
    final_rows: int  # held out from it, for the last phase
    rows_sha256: Mapping[str, str]  # by file
    space: SearchSpace
    settings: SearchSettings
    base_search: RowLoss  # of the base
    base_final: RowLoss
    gpu: str  # that trials must fit into; empty for each machine's own
    near: tuple[str, ...] = ()  # earlier runs and sweeps whose data are like these, in words
    figures: DataFigures = field(default_factory=DataFigures)  # of the held-out rows
    first: tuple[str, ...] = ()  # trials with points that were best there
    quality: Quality = field(default_factory=Quality)  # by what trials are judged, the base's losses among them
    base_rows: RowLoss = field(
        default_factory=RowLoss
    )  # of the base on the search's held-out rows, where a suite judges

    @property
    def base_eval(self) -> RowLoss:
        """The base's eval loss on the held-out rows of the search; empty where there are none."""
        return self.base_rows if self.quality.of_suite else self.base_search
