"""What is compared: one subject for each export and each engine that can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora2serve import manifest
from lora2serve.errors import InputError
from lora2serve.run import Run

ReferenceName = Literal["trained", "original"]


ADAPTERS = ("adapter", "gguf-adapter")  # served on the full-precision base


@dataclass(frozen=True)
class Subject:
    """An export in one engine; ``options`` make the engine."""

    name: str  # of the export's directory, or the URL
    path: Path | None
    target: str
    about: Mapping[str, Any]  # its manifest
    engine: str
    options: Mapping[str, Any]
    reference: ReferenceName  # the one that the verdict is on


def of_exports(run: Run, exports: Sequence[Path], base: Path, window: int) -> list[Subject]:
    """Every export with its engines; InputError where a directory is no export."""
    found = []
    for path in exports:
        about = manifest.read(path)
        target = str(about.get("target"))
        folded = target not in ADAPTERS and about.get("merge_base") == "trained" and run.record.get("quantization")
        reference: ReferenceName = "trained" if folded else "original"
        for engine, options in _engines(path, target, base, window):
            found.append(Subject(path.name, path, target, about, engine, options, reference))
    return found


def of_url(run: Run, url: str, model: str | None) -> Subject:
    """A deployment that runs, by its OpenAI-compatible address; the verdict is as loose as for 8-bit weights."""
    options = {"url": url, "model": model, "tokenizer": str(run.adapter)}
    reference: ReferenceName = "trained" if run.record.get("quantization") else "original"
    return Subject(url, None, "url", {"quant": "url"}, "openai", options, reference)


def _engines(path: Path, target: str, base: Path, window: int) -> list[tuple[str, dict[str, Any]]]:
    if target == "vllm":
        asked: list[tuple[str, dict[str, Any]]] = [("vllm", {"model": str(path), "window": window})]
        if _stored_as(path) in (None, "compressed-tensors"):  # transformers needs another package for AWQ's own format
            asked.insert(0, ("transformers", {"model": str(path)}))
        return asked
    if target == "adapter":
        return [("vllm", {"model": str(base), "window": window, "adapter": str(path), "rank": largest_rank(path)})]
    if target in ("gguf", "ollama", "lmstudio"):
        return [("llama.cpp", {"model": str(gguf_file(path)), "window": window})]
    raise InputError(f"{path}: target {target!r} has no engine to compare in")


def _stored_as(path: Path) -> str | None:
    import json

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
    import json

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max([int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])
