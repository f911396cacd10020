"""``lora2serve.chat``: a conversation with a model, in the engine that will serve it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.check_parity import find_trained
from lora2serve.api.export_request import Named
from lora2serve.api.locate import base_of_run, fetch, find_run
from lora2serve.artifacts import run as runs
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.parity_check.chat_models import ChatModel
    from lora2serve.parity_check.chat_session import ChatSession

ADDRESS = re.compile("https?://", re.IGNORECASE)
HOST = re.compile(r"[\w.-]+:\d+(/\S*)?")


def chat(
    model: Named | None = None, *,
    against: Named | None = None, base: Named | None = None, system: str = "", max_tokens: int | None = None,
    temperature: float | None = None, url_model: str | None = None, progress: Progress | None = None,
) -> ChatSession:  # fmt: skip
    """Load a model into the engine that will serve it, and return a session: ``session.ask("...")[0].text``.

    model: a run or an adapter (in transformers and PEFT, on the base as trained), an export (vLLM's own server for
        vllm, transformers without it; llama.cpp for gguf, ollama and lmstudio), a model's directory, a Hub id of one of
        these, or the address of a server that speaks OpenAI's API. ``runs/latest`` by default.
    against: a second one, which is asked the same; "base" is the model without its adapter, and at an address, the
        model of that name there.
    base: for adapters, the base to load; the one trained on by default.
    system: the system message.
    max_tokens, temperature: of an answer. By default what the model's own settings say: its generation config, the
        GGUF's sampling, or the server's; where they say nothing, 1024 tokens, and the likeliest at each step.
    url_model: the model's name at an address; the first that it lists by default.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises UsageError and InputError for what cannot be asked, EngineError for an engine that is not installed or ends,
    HubError for what cannot be fetched.
    """
    progress = progress or default_progress()
    _refuse_unusable(max_tokens, temperature)
    named = str(model) if model is not None else str(runs.latest().path)
    addresses = [ADDRESS.match(name) for name in (named, str(against or ""))]
    if url_model and not any(addresses):
        raise UsageError(f"--url-model {url_model}: {named} is no address", "an address begins with http://")
    if not ADDRESS.match(named):
        progress.note(f"{named}: loading the libraries and the model")
    from lora2serve.parity_check.chat_session import ChatSession
    from lora2serve.parity_check.engines.chat_engine import AnswerOptions

    finder = _Finder(base, url_model, progress, alone=against is None)
    models = [finder.find(named), *([finder.opponent(named, str(against))] if against is not None else [])]
    if len({item.name for item in models}) < len(models):
        raise UsageError(f"--against {against}: the same as what it is asked beside")
    return ChatSession(models, AnswerOptions(max_tokens, temperature), system, progress=progress)


def _refuse_unusable(max_tokens: int | None, temperature: float | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: expected at least 1")
    if temperature is not None and not 0 <= temperature <= 100:
        raise UsageError(f"--temperature {temperature:g}: expected a number from 0, which takes the likeliest, to 100")


class _Finder:
    """From what a user named to the engine that answers for it."""

    def __init__(self, base: Named | None, url_model: str | None, progress: Progress, *, alone: bool) -> None:
        self._base, self._url_model, self._progress, self._alone = base, url_model, progress, alone

    def find(self, named: str) -> ChatModel:
        """A run, an export, an adapter, a model or a server."""
        from lora2serve.parity_check import chat_models

        if ADDRESS.match(named):
            return chat_models.of_url(named, self._url_model)
        if HOST.fullmatch(named) and not Path(named).exists():
            raise UsageError(f"{named}: no run, export or model", f"an address is http://{named}")
        export = self._export(named)
        if export is None:
            return chat_models.of_trained(find_trained(named, self._base, self._progress), named)
        base = str(self._base_of(export)) if export.target == "adapter" else ""
        return chat_models.of_export(export, base, named, alone=self._alone)

    def opponent(self, named: str, against: str) -> ChatModel:
        """What is asked beside it."""
        from dataclasses import replace

        from lora2serve.parity_check import chat_models, trained_model

        here = Path(against).exists() or find_run(against) is not None
        if ADDRESS.match(named) and not ADDRESS.match(against) and (against == chat_models.BASE or not here):
            return chat_models.of_url(named, against)
        if against != chat_models.BASE:
            return self.find(against)
        first, export = self.find(named), self._export(named)
        if first.options.get("adapters"):
            return replace(first, name=against, without_adapter=True, note="")
        if export is None:
            raise UsageError(f"--against base: {named} has no adapter", "name another run, export or address")
        base = trained_model.of_parts(against, self._base_of(export), (), export.path)
        return chat_models.of_trained(base, against)

    def _export(self, named: str) -> Export | None:
        """The export of that path or Hub id; None for anything else."""
        if find_run(named):
            return None
        path = Path(named) if Path(named).is_dir() else fetch(named, self._progress)
        return Export.open(path) if (path / MANIFEST).is_file() else None

    def _base_of(self, export: Export) -> Path:
        return base_of_run(export.manifest.base, self._base, self._progress)[0]
