"""From what a user names to the engine that answers for it: a run, an export, an adapter, a model or a server."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.check_parity import find_trained
from lora2serve.api.export_request import Named
from lora2serve.api.locate import base_of_run, fetch, find_run
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.run import Run
from lora2serve.errors import HubError, InputError, UsageError, did_you_mean
from lora2serve.parity_check import trained_model
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.parity_check.chat_models import ChatModel

ADDRESS = re.compile("https?://", re.IGNORECASE)
HOST = re.compile(r"[\w.-]+:\d+(/\S*)?")


class ModelFinder:
    """``base`` is what adapters are loaded onto, ``url_model`` a model's name at an address; ``alone``: no other model
    shares the GPU. ``engine`` answers for exports, by default the one that serves them. Without ``weights`` only small
    files come from the Hub: who looks at the models' names asks none of them.
    """

    def __init__(
        self, base: Named | None, url_model: str | None, progress: Progress, *, alone: bool, engine: str = "",
        weights: bool = True,
    ) -> None:  # fmt: skip
        self._base, self._url_model, self._progress, self._alone = base, url_model, progress, alone
        self._engine, self._weights = engine, weights

    def find(self, named: str) -> ChatModel:
        """A run, an export, an adapter, a model or a server."""
        from lora2serve.parity_check import chat_models

        if ADDRESS.match(named):
            return chat_models.of_url(named, self._url_model)
        if HOST.fullmatch(named) and not Path(named).exists():
            raise UsageError(f"{named}: no run, export or model", f"an address is http://{named}")
        export = self.export(named)
        if export is None:
            trained = find_trained(named, self._base, self._progress, weights=self._weights)
            return chat_models.of_trained(trained, named)
        base = str(self._base_of(export)) if export.target == "adapter" else ""
        return chat_models.of_export(export, base, named, alone=self._alone, engine=self._engine)

    def opponent(self, named: str, against: str) -> ChatModel:
        """What is asked beside it."""
        from lora2serve.parity_check import chat_models

        here = Path(against).exists() or find_run(against) is not None
        if ADDRESS.match(named) and not ADDRESS.match(against) and (against == chat_models.BASE or not here):
            return chat_models.of_url(named, against)
        if against != chat_models.BASE:
            try:
                return self.find(against)
            except (HubError, InputError, UsageError) as error:
                near = did_you_mean(against, [chat_models.BASE])
                if here or not near or near in error.message:
                    raise
                raise type(error)(f"{error.message}{near}", error.hint) from None
        first, export = self.find(named), self.export(named)
        if first.options.get("adapters"):
            return replace(first, name=against, without_adapter=True, note="")
        if export is None:
            raise UsageError(f"--against base: {named} has no adapter", "name another run, export or address")
        base = trained_model.of_parts(against, self._base_of(export), (), export.path)
        return chat_models.of_trained(base, against)

    def export(self, named: str) -> Export | None:
        """The export of that path or Hub id; None for anything else."""
        if find_run(named):
            return None
        path = Path(named) if Path(named).is_dir() else fetch(named, self._progress, weights=self._weights)
        return Export.open(path) if (path / MANIFEST).is_file() else None

    def run(self, named: str) -> Run | None:
        """The run that is named, or that an export was made from."""
        if ADDRESS.match(named):
            return None
        run = find_run(named)
        export = None if run else self.export(named)
        return trained_model.run_of(export.path) if export else run

    def _base_of(self, export: Export) -> Path:
        return base_of_run(export.manifest.base, self._base, self._progress, weights=self._weights)[0]
