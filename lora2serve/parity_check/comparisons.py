"""What is compared: one subject for each export and each engine that can hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.adapters.adapter import read_config
from lora2serve.adapters.lint import ranks
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.parity_report import GATES, GateName, ReferenceName
from lora2serve.errors import InputError, UsageError, did_you_mean
from lora2serve.exporting import bundle
from lora2serve.parity_check import own_sampling, thresholds
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.serving import serve_settings
from lora2serve.system.http import check_address, without_credentials
from lora2serve.system.small_files import read_json

NAMES = ("transformers", "peft", "vllm", "vllm-server", "llama.cpp", "ollama", "openai")
VLLM = ("vllm", "vllm-server")
BY_NAME_ONLY = ("vllm-server",)  # the same arithmetic as vllm, and a server start more


@dataclass(frozen=True)
class Comparison:
    """An export in one engine, or a deployment; ``options`` make the engine."""

    name: str  # of the export's directory, or the URL
    path: Path | None
    target: str
    kind: str  # the row of the table of thresholds
    engine: str
    options: Mapping[str, object]
    reference: ReferenceName  # the one that the verdict is on

    @property
    def gates(self) -> tuple[GateName, ...]:
        """Those that are asked, in this order; a deployment shows no files."""
        return GATES if self.path else ("tokens", "behaviour")


def of_exports(origin: TrainedModel, exports: Sequence[Path]) -> list[Comparison]:
    """Every export with its engines; InputError where a directory is no export, UsageError where no engine is left."""
    chosen, comparisons = origin.settings.engines, []
    check_names("engines", chosen)
    for export in map(Export.open, exports):
        manifest, name = export.manifest, export.path.name
        folded = not manifest.is_adapter and manifest.merge_base == "trained" and origin.quantization
        reference: ReferenceName = "trained" if folded else "original"
        for engine, options in engines_of(export, str(origin.base), str(origin.tokenizer), origin.settings.window):
            if engine in chosen or (not chosen and engine not in BY_NAME_ONLY):
                kind = thresholds.kind_of(manifest)
                comparisons.append(Comparison(name, export.path, export.target, kind, engine, options, reference))
    if exports and not comparisons:
        raise UsageError(
            f"no export here is compared in {', '.join(chosen)}", f"{', '.join(path.name for path in exports)}"
        )
    return comparisons


def of_url(origin: TrainedModel, url: str, model: str | None) -> Comparison:
    """A deployment that runs, by its OpenAI-compatible address; the verdict is as loose as for 8-bit weights."""
    check_address(url)
    options = {"url": url, "model": model, "tokenizer": str(origin.tokenizer)}
    reference: ReferenceName = "trained" if origin.quantization else "original"
    return Comparison(without_credentials(url), None, "url", "url", "openai", options, reference)


def refuse_impossible(origin: TrainedModel, comparisons: Sequence[Comparison]) -> None:
    """UsageError where there is nothing to compare, and for a threshold that does not exist."""
    if not comparisons:
        raise nothing_to_compare(origin)
    for comparison in comparisons:
        thresholds.lookup(comparison.kind, origin.settings.thresholds)


def nothing_to_compare(origin: TrainedModel) -> UsageError:
    """Of a model without exports."""
    return UsageError(f"{origin.name}: no exports to compare", "`lora2serve export --target ...` makes some")


def check_names(key: str, names: Sequence[str]) -> None:
    """UsageError for an engine that does not exist."""
    for name in names:
        if name not in NAMES:
            near = did_you_mean(name, NAMES)
            raise UsageError(f"parity.{key}: unknown engine {name!r}{near}", f"known: {', '.join(NAMES)}")


def engines_of(export: Export, base: str, tokenizer: str, window: int) -> list[tuple[str, dict[str, object]]]:
    """The engines that open this target, with what each is made from: the base's directory, for adapters, that of the
    trained tokenizer, and the tokens of one request; InputError where none does.
    """
    path, target = export.path, export.target
    server: dict[str, object] = {"export": str(path), "base": base, "tokenizer": tokenizer, "window": window}
    if target == "vllm":
        engines: list[tuple[str, dict[str, object]]] = [("vllm", {"model": str(path), "window": window})]
        if _stored_as(path) in (None, "compressed-tensors"):  # transformers needs another package for AWQ's own format
            engines.insert(0, ("transformers", {"model": str(path)}))
        return [*engines, ("vllm-server", server)]
    if target == "adapter":
        tuned: dict[str, object] = {"model": base, "window": window, "adapter": str(path), "rank": largest_rank(path)}
        plain: dict[str, object] = {"base": base, "adapters": [str(path)], "tokenizer": tokenizer}
        return [("peft", plain), ("vllm", tuned), ("vllm-server", server)]
    hosted: dict[str, object] = {"export": str(path), "tokenizer": tokenizer, "window": window}
    if target in ("gguf", "ollama", "lmstudio"):
        file: dict[str, object] = {"model": str(export.gguf), "window": window}
        if target == "ollama":
            modelfile = path / "Modelfile"
            file |= {"modelfile": str(modelfile)} if own_sampling.differ(modelfile, export.gguf) else {}
            return [("llama.cpp", file), ("ollama", hosted)]
        return [("llama.cpp", file)]
    if target == "ollama-adapter":
        return [("ollama", hosted)]
    if target == "gguf-adapter":
        return [("llama.cpp", {"model": base, "window": window, "adapter": str(export.gguf)})]
    raise InputError(f"{path}: target {target!r} has no engine to compare in")


def served_otherwise(comparison: Comparison, computed: str | None, base: Path, window: int) -> str:
    """What ``serve`` starts the export with and the engine had otherwise; empty where nothing is.

    ``computed``: the type that the engine computed in; ``window``: tokens that it had room for.
    """
    path = comparison.path
    if path is None:
        return ""
    settings, served, parts = _served(path), served_dtype(path, base), list[str]()
    if computed and served and computed != served:
        parts.append(f"computed in {computed}, served in {served}")
    served_base = (Manifest.read(path).options or {}).get("served_base")
    if served_base and served_base != str(base):
        parts.append(f"on {base.name}, served on {served_base}")
    length = settings.get("max-model-len")
    if comparison.engine in VLLM and isinstance(length, int) and window <= _short_rope(path) < length:
        parts.append(f"LongRoPE's short factors; at max-model-len {length} vLLM takes the long ones for every text")
    more = [str(key)[:40] for key in settings if key not in serve_settings.KNOWN]
    if more and comparison.engine == "vllm":
        parts.append(f"without {', '.join(more)} of serve.yaml")
    return "; ".join(parts)


def served_dtype(export: Path, base: Path) -> str | None:
    """That of its serve.yaml; without one, vLLM serves an adapter in the type of its base. None: the engine decides."""
    if not (export / bundle.CONFIG).is_file():
        dtype = stored_dtype(base)
        return dtype if dtype in ("bfloat16", "float16") else None  # of float32 the engine makes a smaller one
    named = _served(export).get("dtype")
    return str(named) if named and named != "auto" else None


def _served(export: Path) -> Mapping[object, object]:
    """Its serve.yaml; empty where it has none that can be read: the settings gate says so."""
    try:
        return serve_settings.parsed(export / bundle.CONFIG)
    except InputError:
        return {}


def _short_rope(export: Path) -> float:
    """Tokens up to which LongRoPE has factors of its own; infinite without such."""
    try:
        config = read_json(export / "config.json", "no config.json in it", InputError)
    except InputError:
        return math.inf
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    long = {rope.get("rope_type"), rope.get("type")} & {"longrope", "su"}
    return original if long and isinstance(original, int) else math.inf


def stored_dtype(model: Path) -> str:
    """The type that a model's config names."""
    from lora2serve.weights.checkpoint import read_config as read_model_config

    config = read_model_config(model)
    return str(config.get("dtype") or config.get("torch_dtype"))


def _stored_as(path: Path) -> str | None:
    quantization = read_json(path / "config.json", "no config.json in it", InputError).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else None


def largest_rank(adapter: Path) -> int:
    """What vLLM's max_lora_rank must reach."""
    return max(ranks({"r": 1, **read_config(adapter)}))
