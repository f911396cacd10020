"""What is compared: one subject for each export and each engine that can hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2serve.artifacts import manifest
from lora2serve.errors import InputError, UsageError, did_you_mean
from lora2serve.parity_check.trained_model import ReferenceName, TrainedModel

ADAPTERS = ("adapter", "gguf-adapter", "ollama-adapter")  # served on the full-precision base
NAMES = ("transformers", "peft", "vllm", "vllm-server", "llama.cpp", "ollama", "openai")
ASKED_FOR = ("vllm-server",)  # only where it is named: the same arithmetic as vllm, and a server start more


@dataclass(frozen=True)
class Comparison:
    """An export in one engine; ``options`` make the engine."""

    name: str  # of the export's directory, or the URL
    path: Path | None
    target: str
    about: Mapping[str, Any]  # its manifest
    engine: str
    options: Mapping[str, Any]
    reference: ReferenceName  # the one that the verdict is on


def of_exports(origin: TrainedModel, exports: Sequence[Path]) -> list[Comparison]:
    """Every export with its engines; InputError where a directory is no export, UsageError where no engine is left."""
    chosen, found = origin.settings.engines, []
    check_names("engines", chosen)
    for path in exports:
        about = manifest.read(path)
        target = str(about.get("target"))
        folded = target not in ADAPTERS and about.get("merge_base") == "trained" and origin.quantization
        reference: ReferenceName = "trained" if folded else "original"
        for engine, options in _engines(path, target, about, origin):
            if engine in chosen or (not chosen and engine not in ASKED_FOR):
                found.append(Comparison(path.name, path, target, about, engine, options, reference))
    if exports and not found:
        raise UsageError(
            f"no export here is compared in {', '.join(chosen)}", f"{', '.join(path.name for path in exports)}"
        )
    return found


def of_url(origin: TrainedModel, url: str, model: str | None) -> Comparison:
    """A deployment that runs, by its OpenAI-compatible address; the verdict is as loose as for 8-bit weights."""
    options = {"url": url, "model": model, "tokenizer": str(origin.tokenizer)}
    reference: ReferenceName = "trained" if origin.quantization else "original"
    return Comparison(url, None, "url", {"quant": "url"}, "openai", options, reference)


def check_names(key: str, names: Sequence[str]) -> None:
    """UsageError for an engine that does not exist."""
    for name in names:
        if name not in NAMES:
            near = did_you_mean(name, NAMES)
            raise UsageError(f"parity.{key}: unknown engine {name!r}{near}", f"known: {', '.join(NAMES)}")


def _engines(
    path: Path, target: str, about: Mapping[str, Any], origin: TrainedModel
) -> list[tuple[str, dict[str, Any]]]:
    """The engines that open this target, with what each is made from; windows are set once the data are known."""
    window, base = origin.settings.window, str(origin.base)
    server = {"export": str(path), "base": base, "tokenizer": str(origin.tokenizer), "window": window}
    if target == "vllm":
        asked: list[tuple[str, dict[str, Any]]] = [("vllm", {"model": str(path), "window": window})]
        if _stored_as(path) in (None, "compressed-tensors"):  # transformers needs another package for AWQ's own format
            asked.insert(0, ("transformers", {"model": str(path)}))
        return [*asked, ("vllm-server", server)]
    if target == "adapter":
        tuned = {"model": base, "window": window, "adapter": str(path), "rank": largest_rank(path)}
        plain = {"base": base, "adapters": [str(path)], "tokenizer": str(origin.tokenizer)}
        return [("peft", plain), ("vllm", tuned), ("vllm-server", server)]
    hosted = {"export": str(path), "tokenizer": str(origin.tokenizer), "window": window}
    if target in ("gguf", "ollama", "lmstudio"):
        file = {"model": str(gguf_file(path)), "window": window}
        return [("llama.cpp", file), ("ollama", hosted)] if target == "ollama" else [("llama.cpp", file)]
    if target == "ollama-adapter":
        return [("ollama", hosted)]
    if target == "gguf-adapter":
        return [("llama.cpp", {"model": base, "window": window, "adapter": str(gguf_file(path))})]
    raise InputError(f"{path}: target {target!r} has no engine to compare in")


def _stored_as(path: Path) -> str | None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return (config.get("quantization_config") or {}).get("quant_method")


def gguf_file(path: Path) -> Path:
    """The GGUF of an export; the first file where it is split."""
    files = sorted(file for file in path.rglob("*.gguf") if not file.name.startswith("mmproj-"))
    if not files:
        raise InputError(f"{path}: no .gguf in it", "export again")
    return files[0]


def largest_rank(adapter: Path) -> int:
    """What vLLM's max_lora_rank must reach."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max([int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])
