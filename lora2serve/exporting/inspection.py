"""What a path is: a run, an export, an adapter or a model, in facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2serve.adapters.adapter import CONFIG, Adapter, open_adapter
from lora2serve.adapters.lint import lint
from lora2serve.artifacts import manifest
from lora2serve.artifacts.run import Run, is_run
from lora2serve.errors import InputError
from lora2serve.system.hub_snapshot import hub_snapshot
from lora2serve.weights.checkpoint import Checkpoint, read_config


def inspect(path: Path) -> dict[str, Any]:
    """Facts about ``path``; its ``problems`` are what is wrong with it."""
    if (path / manifest.NAME).is_file():
        return _export(path)
    if is_run(path):
        return _run(Run(path))
    if (path / CONFIG).is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        return _model(path)
    raise InputError(
        f"{path}: no run, export, adapter or model",
        f"expected {manifest.NAME}, run.json, {CONFIG} or config.json in it",
    )


def _export(path: Path) -> dict[str, Any]:
    about = manifest.read(path)
    pulled = hub_snapshot(path)  # of the Hub's cache, where only what a model needs lies, by links
    said = {
        "pulled from": f"{pulled.id}@{pulled.commit}" if pulled else None,
        "verify it": f"lora2serve pull-check {pulled.id}@{pulled.commit}" if pulled else None,
        "problems": [] if pulled else manifest.verify(path),
    }
    if "exports" in about:
        return {"kind": "exports", "exports": [_facts(one) for one in about["exports"].values()], **said}
    facts = {**_facts(about), **said}
    if about["target"] == "adapter":
        facts["multi-LoRA"] = _multi_lora(open_adapter(path), (about.get("base") or {}).get("path"))
    return facts


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    survival = about.get("survival") or {}
    facts = {
        "kind": "export",
        "target": about["target"],
        "quant": about.get("quant"),
        "base": (about.get("base") or {}).get("id"),
        "merge base": about.get("merge_base"),
        "files": len(about["files"]),
        "bytes": sum(file["size"] for file in about["files"].values()),
        "parity": (about.get("parity") or {}).get("met", "not run"),
        "parity by engine": _parity(about),
    }
    if survival:
        facts["delta that survives the cast"] = f"{min(survival.values()):.4f} to {max(survival.values()):.4f}"
    return facts


def _parity(about: Mapping[str, Any]) -> dict[str, str]:
    """Engine -> its verdict, and what stands behind it."""
    found = {}
    for engine, said in ((about.get("parity") or {}).get("engines") or {}).items():
        figures = [f"mean KL {said['mean_kl']:.2g}"] if isinstance(said.get("mean_kl"), float) else []
        figures += [f"same top token {said['top1']:.2%}"] if isinstance(said.get("top1"), float) else []
        against = f"against {said.get('reference')}, {said.get('version')}"
        found[engine] = "; ".join([str(said.get("status")), *figures, against])
    return found


def _verdict(about: Mapping[str, Any]) -> str:
    parity = about.get("parity") or {}
    return {"True": "met", "False": "not met"}.get(str(parity.get("met")), "not run")


def _run(run: Run) -> dict[str, Any]:
    record = run.record
    return {
        "kind": "run",
        "base": record.base.id or None,
        "quantisation": record.quantization.type if record.quantization else "none",
        "eval loss": {name: loss.eval_loss for name, loss in record.metrics.measured().items()},
        "exports": [path.name for path in run.list_exports()],
        "parity": {path.name: _verdict(manifest.read(path)) for path in run.list_exports()},
        "adapter": _adapter(run.adapter, record.base.path),
        "problems": [],
    }


def _adapter(path: Path, base: str | None = None) -> dict[str, Any]:
    adapter = open_adapter(path)
    ranks = Counter(layer.parts["lora_A"].shape[0] for layer in adapter.layers.values() if "lora_A" in layer.parts)
    leaves = Counter(name.rsplit(".", 1)[-1] for name in adapter.layers)
    return {
        "kind": "adapter",
        "method": adapter.method,
        "base": adapter.base,
        "modules": dict(leaves),
        "trained in full": sorted(adapter.full),
        "ranks": dict(ranks),
        "multi-LoRA": _multi_lora(adapter, base),
        "problems": [],
    }


def _multi_lora(adapter: Adapter, base: str | None) -> list[str]:
    """Whether vLLM serves the adapter beside others as it is, and if not, each reason with the way out."""
    config = _base_config(base or adapter.base)
    findings = lint(adapter.config, adapter.tensors.specs(), config or {})
    said = [f"{one.rule}: {one.message} ({one.way_out})" for one in findings] or ["vLLM serves it as it is"]
    unknown = "" if config else f"{adapter.base or 'the base'} is not here: the rules of its class were not asked"
    return [*said, *([unknown] if unknown else [])]


def _base_config(base: str | None) -> Mapping[str, Any] | None:
    """config.json of a local directory or of a Hub id in the cache; nothing is fetched."""
    if not base:
        return None
    if (Path(base) / "config.json").is_file():
        return read_config(Path(base))
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "config.json")
    except HFValidationError:
        return None
    return read_config(Path(found).parent) if isinstance(found, str) else None


def _model(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint(path)
    specs = checkpoint.specs()
    return {
        "kind": "model",
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs),
        "types": dict(Counter(spec.dtype for spec in specs)),
        "quantisation": (checkpoint.config.get("quantization_config") or {}).get("quant_method"),
        "problems": [],
    }
