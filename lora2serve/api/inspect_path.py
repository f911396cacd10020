"""``lora2serve.inspect``: what a path is (a run, an export, an adapter or a model), in facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lora2serve.adapters.adapter import CONFIG, Adapter, open_adapter
from lora2serve.adapters.lint import lint
from lora2serve.api.locate import locate
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import EngineVerdict, Manifest
from lora2serve.artifacts.run import ROOT, TRAINER_STATE, Run, is_cut_off
from lora2serve.config.arguments import checked
from lora2serve.config.recipe import ModelRecipe, load_section
from lora2serve.console import default_progress
from lora2serve.errors import InputError
from lora2serve.progress import Progress
from lora2serve.system.hub_snapshot import hub_snapshot
from lora2serve.system.small_files import read_json
from lora2serve.training.checkpoints import last_checkpoint, step_of
from lora2serve.weights.checkpoint import Checkpoint, read_config

Verdict = Literal["met", "not_met", "not_run"]


@dataclass(frozen=True)
class MultiLoraProblem:
    """A rule of vLLM that an adapter breaks, and what to do about it."""

    rule: str
    message: str
    way_out: str


@dataclass(frozen=True)
class MultiLora:
    """Whether vLLM serves an adapter beside others as it is."""

    servable: bool
    problems: tuple[MultiLoraProblem, ...]
    missing_base: str | None  # the base whose config.json is not here, so that the rules of its class were not checked


@dataclass(frozen=True, kw_only=True)
class InspectedExport:
    """An export."""

    kind: Literal["export"] = "export"
    target: str
    quant: str | None
    base: str | None
    merge_base: str | None
    files: int
    bytes: int
    parity: Verdict
    parity_by_engine: Mapping[str, EngineVerdict]
    survival: tuple[float, float] | None  # the smallest and largest share of a delta that survives the cast
    multi_lora: MultiLora | None = None
    pulled_from: str | None = None  # id@commit on the Hub
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InspectedExports:
    """Several exports in one repository."""

    kind: Literal["exports"] = "exports"
    exports: tuple[InspectedExport, ...]
    pulled_from: str | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InspectedAdapter:
    """A PEFT adapter directory."""

    kind: Literal["adapter"] = "adapter"
    method: str
    base: str | None
    modules: Mapping[str, int]  # name of a module -> how many have an adapter
    trained_in_full: tuple[str, ...]
    ranks: Mapping[int, int]  # rank -> how many modules have it
    multi_lora: MultiLora
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InspectedRun:
    """A run."""

    kind: Literal["run"] = "run"
    base: str | None
    quantization: str | None
    resumable: str  # what continues a run that was interrupted
    eval_loss: Mapping[str, float | None]
    exports: tuple[str, ...]
    parity: Mapping[str, Verdict]  # of each export
    adapter: InspectedAdapter
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InspectedUnfinishedRun:
    """A run whose training was cut off, or goes on."""

    kind: Literal["unfinished_run"] = "unfinished_run"
    base: str | None
    checkpoint_step: int | None  # of the last checkpoint; None where there is none
    steps: int | None  # in all
    resume: str | None  # the command that continues it
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InspectedModel:
    """A plain model directory."""

    kind: Literal["model"] = "model"
    architecture: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]  # type -> how many tensors have it
    quantization: str | None
    problems: tuple[str, ...] = field(default=())


Inspected = (
    InspectedExport | InspectedExports | InspectedAdapter | InspectedRun | InspectedUnfinishedRun | InspectedModel
)


@checked
def inspect(path: str | Path, *, progress: Progress | None = None) -> Inspected:
    """What ``path`` is, in facts; ``problems`` says in what an export's files differ from its manifest.

    path: a run, an export, an adapter or a model; by path, by name under ``runs/``, or by its Hub id.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises InputError for anything else, and for files that cannot be read.
    """
    unfinished = next((place for place in (Path(path).expanduser(), ROOT / path) if is_cut_off(place)), None)
    if unfinished and (unfinished / "recipe.yaml").is_file():
        return _unfinished_run(Run(unfinished))
    source = locate(path, progress or default_progress())
    if source.is_export:
        return _export(source.path)
    if source.run:
        return _run(source.run)
    if source.is_adapter:
        return _adapter(source.path)
    if (source.path / "config.json").is_file():
        return _model(source.path)
    raise InputError(
        f"{path}: not a run, export, adapter or model",
        f"expected {MANIFEST}, run.json, {CONFIG} or config.json in it",
    )


def _export(path: Path) -> InspectedExport | InspectedExports:
    manifest = Manifest.read(path)
    snapshot = hub_snapshot(path)  # of the Hub's cache, which has only what a model needs, as links
    pulled_from = f"{snapshot.id}@{snapshot.commit}" if snapshot else None
    problems = () if snapshot else tuple(manifest.verify(path))
    if manifest.exports:
        exports = tuple(_export_facts(member) for member in manifest.exports.values())
        return InspectedExports(exports=exports, pulled_from=pulled_from, problems=problems)
    multi_lora = _multi_lora(open_adapter(path), manifest.base.path) if manifest.target == "adapter" else None
    return replace(_export_facts(manifest), multi_lora=multi_lora, pulled_from=pulled_from, problems=problems)


def _export_facts(manifest: Manifest) -> InspectedExport:
    shares = manifest.survival.values()
    return InspectedExport(
        target=manifest.target,
        quant=manifest.quant,
        base=manifest.base.id or None,
        merge_base=manifest.merge_base,
        files=len(manifest.files),
        bytes=manifest.bytes,
        parity=_verdict(manifest),
        parity_by_engine=manifest.parity.engines if manifest.parity else {},
        survival=(min(shares), max(shares)) if shares else None,
    )


def _verdict(manifest: Manifest) -> Verdict:
    return "not_run" if manifest.parity is None else "met" if manifest.parity.met else "not_met"


def _run(run: Run) -> InspectedRun:
    record = run.record
    exports = {path.name: _verdict(Manifest.read(path)) for path in run.list_exports()}
    return InspectedRun(
        base=record.base.id or None,
        quantization=record.quantization.type if record.quantization else None,
        resumable=run.resumable,
        eval_loss={name: loss.eval_loss for name, loss in record.metrics.measured().items()},
        exports=tuple(exports),
        parity=exports,
        adapter=_adapter(run.adapter, record.base.path),
    )


def _unfinished_run(run: Run) -> InspectedUnfinishedRun:
    last = last_checkpoint(run)
    steps = read_json(last / TRAINER_STATE, "no state of a trainer", InputError).get("max_steps") if last else None
    return InspectedUnfinishedRun(
        base=load_section(run.recipe, ModelRecipe).path,
        checkpoint_step=step_of(last) if last else None,
        steps=steps if isinstance(steps, int) else None,
        resume=f"lora2serve train --resume {run.path}" if last else None,
    )


def _adapter(path: Path, base: str | None = None) -> InspectedAdapter:
    adapter = open_adapter(path)
    ranks = Counter(layer.parts["lora_A"].shape[0] for layer in adapter.layers.values() if "lora_A" in layer.parts)
    modules = Counter(name.rsplit(".", 1)[-1] for name in adapter.layers)
    return InspectedAdapter(
        method=adapter.method,
        base=adapter.base,
        modules=dict(modules),
        trained_in_full=tuple(sorted(adapter.full)),
        ranks=dict(ranks),
        multi_lora=_multi_lora(adapter, base),
    )


def _multi_lora(adapter: Adapter, base: str | None) -> MultiLora:
    config = _base_config(base or adapter.base)
    findings = lint(adapter.config, adapter.tensors.specs(), config or {})
    problems = tuple(MultiLoraProblem(finding.rule, finding.message, finding.way_out) for finding in findings)
    return MultiLora(not problems, problems, None if config else str(adapter.base or "the base"))


def _base_config(base: str | None) -> Mapping[str, object] | None:
    """config.json of a local directory or of a Hub id in the cache; nothing is fetched."""
    if not base:
        return None
    if (Path(base) / "config.json").is_file():
        return read_config(Path(base))
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(base, "config.json")
    except HFValidationError:
        return None
    return read_config(Path(file).parent) if isinstance(file, str) else None


def _model(path: Path) -> InspectedModel:
    checkpoint = Checkpoint(path)
    specs = checkpoint.specs()
    return InspectedModel(
        architecture=_first_word(checkpoint.config.get("architectures")) or "unknown",
        tensors=len(specs),
        parameters=sum(spec.numel for spec in specs),
        dtypes=dict(Counter(spec.dtype for spec in specs)),
        quantization=_quantization(checkpoint.config.get("quantization_config")),
    )


def _first_word(value: object) -> str | None:
    first = value[0] if isinstance(value, list) and value else None
    return first if isinstance(first, str) else None


def _quantization(config: object) -> str | None:
    method = config.get("quant_method") if isinstance(config, dict) else None
    return method if isinstance(method, str) else None
