"""``lora2serve.chat``: a conversation with a model, in the engine that will serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora2serve.api.export_request import Named
from lora2serve.api.model_finder import ADDRESS, ModelFinder
from lora2serve.artifacts import run as runs
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.parity_check.chat_session import ChatSession


@checked
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

    finder = ModelFinder(base, url_model, progress, alone=against is None)
    models = [finder.find(named), *([finder.opponent(named, str(against))] if against is not None else [])]
    if len({item.name for item in models}) < len(models):
        raise UsageError(f"--against {against}: the same as what it is asked beside")
    return ChatSession(models, AnswerOptions(max_tokens, temperature), system, progress=progress)


def _refuse_unusable(max_tokens: int | None, temperature: float | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: expected at least 1")
    if temperature is not None and not 0 <= temperature <= 100:
        raise UsageError(f"--temperature {temperature:g}: expected a number from 0, which takes the likeliest, to 100")
