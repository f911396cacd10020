"""Which engine answers for what: the one that will serve it, made as parity makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora2serve.artifacts.export_dir import Export
from lora2serve.errors import EngineError, UsageError
from lora2serve.exporting import bundle
from lora2serve.parity_check.comparisons import engines_of
from lora2serve.parity_check.installed_engines import engine_state
from lora2serve.parity_check.trained_model import TOKENIZER, TrainedModel
from lora2serve.system.http import check_address, without_credentials

CONTEXT = 8192  # tokens of a conversation at most; less where the model was made for less
BASE = "base"  # the model without its adapter, on the command line and in servers
GPU_SHARE = 0.9  # of its memory, for all models of a conversation
PREFERRED = ("vllm-server", "peft", "llama.cpp", "transformers")
ADDED: Mapping[str, Mapping[str, object]] = {  # to what parity makes the engine of
    "peft": {"as_served": True}, "transformers": {"as_served": True}, "llama.cpp": {"scores": False},
}  # fmt: skip


@dataclass(frozen=True)
class ChatModel:
    """A model to talk to: its engine, and what makes that. ``without_adapter``: the same engine's base."""

    name: str
    engine: str
    options: Mapping[str, object]
    without_adapter: bool = False
    note: str = ""  # what the user should know of it


def of_trained(origin: TrainedModel, name: str) -> ChatModel:
    """What was trained, in transformers and PEFT, on the base as it was trained."""
    return ChatModel(name, "peft", {**origin.peft_options(origin.references[-1]), **ADDED["peft"]})


def of_export(export: Export, base: str, name: str, *, alone: bool, engine: str = "") -> ChatModel:
    """An export; ``base`` is the directory of an adapter's. ``alone``: no other model shares the GPU.

    ``engine`` is the one that shall answer, by default the one that serves it.
    """
    refuse_unopened(export)
    own_tokenizer = (export.path / TOKENIZER).is_file() or not base
    engines = dict(engines_of(export, base, str(export.path) if own_tokenizer else base, CONTEXT))
    note = ""
    if "vllm-server" in engines and export.target == "vllm":
        engines["vllm-server"]["gpu_memory"] = GPU_SHARE if alone else GPU_SHARE / 2
        server = engine_state("vllm-server")
        if server.missing:
            del engines["vllm-server"]
            note = f"{name}: vLLM is not installed here, so transformers answers: {server.fix}"
            if "transformers" not in engines:
                raise EngineError(f"{name}: nothing but vLLM opens these weights", server.fix)
    elif export.target == "adapter" and not engine:
        engines = {"peft": engines["peft"]}
    answering = [known for known in PREFERRED if known in engines]
    if engine and engine not in answering:
        raise UsageError(f"--engine {engine}: {name} is answered for by {', '.join(answering)}", note)
    engine = engine or answering[0]
    return ChatModel(name, engine, {**engines[engine], **ADDED.get(engine, {})}, note=note)


def of_url(url: str, model: str | None) -> ChatModel:
    """A server that runs, by its OpenAI-compatible address and the model's name there."""
    check_address(url)
    return ChatModel(model or without_credentials(url), "openai", {"url": url, "tokenizer": "", "model": model})


def refuse_unopened(export: Export) -> None:
    """UsageError for what is answered by no engine that can be started here."""
    path = export.path
    if export.target == bundle.TARGET:
        each = "; ".join(f"`lora2serve chat {member}`" for member in export.members.values())
        raise UsageError(f"{path}: a bundle of {len(export.members)} adapters, expected one model", each)
    if export.target == "gguf-adapter":
        raise UsageError(f"{path}: an adapter for llama.cpp, without its base", "ask the run, or a gguf export of it")
    if export.target == "ollama-adapter":
        name = export.served_name
        raise UsageError(
            f"{path}: an adapter for Ollama, which no other engine opens",
            f"`lora2serve serve {path} --engine ollama`, then "
            f"`lora2serve chat http://localhost:11434 --url-model {name}`",
        )
