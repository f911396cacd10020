"""A model that is evaluated: its engine, the run that it is of, and where its scores go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.export_request import Named
from lora2serve.api.locate import find_run
from lora2serve.api.model_finder import ADDRESS, ModelFinder
from lora2serve.api.registered import registered_version
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.suite_scores import FOLDER
from lora2serve.artifacts.version_marker import is_of_version
from lora2serve.errors import UsageError
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.evaluation.evaluation_plan import PlannedModel
    from lora2serve.parity_check.chat_models import ChatModel

SUITE = "--suite FILE names rows with what is expected"


@dataclass(frozen=True)
class EvaluatedModel:
    """``home`` is the folder of its scores; ``is_base``: it has no training of ours behind it."""

    name: str
    chat: ChatModel
    home: Path
    run: Run | None = None
    is_base: bool = False
    overlap: str = ""

    def file_name(self, suite: str, *, shared: bool) -> str:
        """Of its scores; ``shared``: those of other models lie in the same folder."""
        return f"{suite}.{slug(self.name)}.json" if shared else f"{suite}.json"


def find_models(
    named: Sequence[str], against: str | None, base: Named | None, url_model: str | None, engine: str,
    progress: Progress, *, weights: bool = True,
) -> list[EvaluatedModel]:  # fmt: skip
    """Those that are named, and at the end what they are compared with; ``weights``: as for ``ModelFinder``."""
    if url_model and not any(ADDRESS.match(name) for name in (*named, against or "")):
        raise UsageError(f"--url-model {url_model}: {named[0]} is no address", "an address begins with http://")
    finder = ModelFinder(base, url_model, progress, alone=True, engine=engine, weights=weights)
    models = [EvaluatedModel(name, finder.find(name), home_of(name, finder), finder.run(name)) for name in named]
    if against is None:
        return models
    chat = finder.opponent(named[0], against)
    if chat.without_adapter or against == "base":
        return [
            *models,
            EvaluatedModel(against, replace(chat, name=against), models[0].home / against, None, is_base=True),
        ]
    return [*models, EvaluatedModel(against, chat, home_of(against, finder), finder.run(against))]


def home_of(name: str, finder: ModelFinder) -> Path:
    """In the run where there is one; of a version, which does not change, and of all else, in ``evals/`` here."""
    if not ADDRESS.match(name) and registered_version(name) is None:
        run = find_run(name)
        if run and not is_of_version(run.path):
            return run.path / FOLDER
        export = None if run else finder.export(name)
        home = finder.run(name) if export else None
        if export and home and not is_of_version(home.path):
            return home.path / FOLDER / export.path.resolve().name
    return Path(FOLDER) / slug(name)


def planned(model: EvaluatedModel, records: Sequence[Path]) -> PlannedModel:
    """What a plan says of it; ``records``: the files of its scores."""
    from lora2serve.evaluation.evaluation_plan import PlannedModel
    from lora2serve.parity_check.installed_engines import engine_state

    state = engine_state(model.chat.engine)
    return PlannedModel(model.name, state, model.overlap, model.chat.note, tuple(map(str, records)))


def heldout_rows(models: Sequence[EvaluatedModel]) -> Path:
    """Of the first model that has a run with some; UsageError where none has."""
    for model in models:
        if model.run and model.run.eval_data.is_file():
            return model.run.eval_data
    raise UsageError(f"{models[0].name}: no held-out rows to ask", SUITE)


def refuse_same(models: Sequence[EvaluatedModel]) -> None:
    """UsageError for one that is named twice: nothing could tell the two apart."""
    names = [model.name for model in models]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{repeated}: named twice", "one that is compared with itself says nothing")


def slug(name: str) -> str:
    """A model's name as that of a folder or a file."""
    short = name if ADDRESS.match(name) or "@" in name else Path(name).name
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", short).strip("-.") or "model"
