"""``lora2serve.export``: a run, an adapter or a model, to every target in one pass over its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora2serve.api import after_export, export_calibration
from lora2serve.api.export_request import Combine, DType, ExportRequest, Named, OllamaKind, several
from lora2serve.api.export_source import open_source
from lora2serve.artifacts import staging
from lora2serve.artifacts.export_dir import Export
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.exporting import bundle, shared_export, sinks, stream
from lora2serve.exporting.open_model import MergeBase
from lora2serve.exporting.sinks import Exporter, ExportModel
from lora2serve.exporting.stream import ExportPlan
from lora2serve.progress import Progress


@checked
def export(
    source: Named | Sequence[Named] | None = None, *,
    targets: str | Sequence[str], quants: str | Sequence[str] = (), out: Named | None = None, overwrite: bool = False,
    base: Named | None = None, merge_base: MergeBase = "auto", dtype: DType | None = None, name: str | None = None,
    adapters: Sequence[Named] = (), combine: Combine | None = None, weights: Sequence[float] = (), density: float = 0.5,
    allow_base_mismatch: bool = False, allow_pickle: bool = False, calibrate: Named | None = None,
    shard_size: str | int | None = None, tensor_type: Sequence[str] = (), pre: str | None = None,
    imatrix: Named | None = None, split_size: str | int | None = None,
    served_base: str | None = None, as_lora_rank: int | None = None,
    as_kind: OllamaKind | None = None, from_model: str | None = None, create: str | None = None, install: bool = False,
    shards: str | None = None, progress: Progress | None = None,
) -> list[Export]:  # fmt: skip
    """Write ``source`` for one or more targets, in one pass over the weights; all of the exports, or none.

    source: a run, a PEFT adapter directory, a plain model directory, or a Hub id of one of these; ``runs/latest`` by
        default. Several of them, with ``targets="adapter"``, make one bundle of adapters for one server.
    targets: "vllm", "gguf", "ollama", "lmstudio", "adapter", "gguf-adapter", or several of these.
    quants: types such as "Q4_K_M" or "fp8"; each goes to every target that knows it.
    out: the folder for one directory per target and type; the run's ``exports/`` by default.
    overwrite: replace exports that exist, once the new ones are complete.
    base, merge_base, dtype, name: what to fold onto, and which of its weights ("auto", "trained" or "original"); the
        type of merged 16-bit weights ("bf16", "fp16" or "fp32"); the model's name in files and servers.
    adapters, combine, weights, density: instead of ``source``, adapters to fold onto ``base`` one after another, or to
        combine first by PEFT's method of that name.
    allow_base_mismatch, allow_pickle: fold onto a base that is not the run's; read an ``adapter_model.bin``.
    calibrate: data to measure activations on, for AWQ, GPTQ and importance matrices; "train" is the run's own.
    shard_size (vllm), tensor_type, pre, imatrix, split_size (GGUF), served_base, as_lora_rank (adapter), as_kind,
        from_model, create (ollama), install (lmstudio): options of these targets: see ``lora2serve export --help``.
    shards: "2/3" is the second of three workers that write one export; [] where it ends while others still write.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises UsageError for options that do not go together, CheckpointError and AdapterError for files that cannot be
    read, MergeError where base and adapter do not fit, and ExportError with every target's refusal, before the first
    byte is written. All are Lora2ServeError.
    """
    request = ExportRequest(
        () if source is None else several(source), several(targets), several(quants),
        Path(out) if out else None, overwrite, base=base, merge_base=merge_base, dtype=dtype, name=name,
        adapters=tuple(adapters), combine=combine, weights=tuple(weights), density=density, install=install,
        allow_base_mismatch=allow_base_mismatch, allow_pickle=allow_pickle, calibrate=calibrate, shard_size=shard_size,
        tensor_type=several(tensor_type), pre=pre, imatrix=Path(imatrix) if imatrix else None,
        split_size=split_size, served_base=served_base, as_lora_rank=as_lora_rank, as_kind=as_kind,
        from_model=from_model, create=create, shards=shards,
    )  # fmt: skip
    return run_export(request, progress)


@checked
def run_export(request: ExportRequest, progress: Progress | None = None) -> list[Export]:
    """``export``, with its arguments in one value."""
    progress = progress or default_progress()
    with ExitStack() as stack:
        prepared = _prepare(request, progress, stack, dry_run=False)
        if isinstance(prepared, _Bundle):
            overwrite = request.overwrite
            return [bundle.export(prepared.models, prepared.options, prepared.out, progress, overwrite=overwrite)]
        if request.shards:
            exports = _worker_export(prepared, request, progress)
        else:
            exports = stream.export(prepared.model, prepared.plans, progress, overwrite=request.overwrite)
    after_export.hand_over(exports, request, progress)
    return exports


def _worker_export(prepared: _Single, request: ExportRequest, progress: Progress) -> list[Export]:
    """What this one of several workers has published."""
    place = shared_export.WorkerPlace.parse(request.shards or "")
    exported = shared_export.export(prepared.model, prepared.plans[0], place, progress, overwrite=request.overwrite)
    return [exported] if exported else []


@checked
def plan_export(request: ExportRequest, progress: Progress | None = None) -> ExportPlan:
    """What ``export`` would write; reads no weights and writes nothing.

    request: the arguments of ``export`` in one value.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises what ``export`` would refuse before it reads a weight.
    """
    progress = progress or default_progress()
    with ExitStack() as stack:
        prepared = _prepare(request, progress, stack, dry_run=True)
        if isinstance(prepared, _Bundle):
            return bundle.dry_run(prepared.models, prepared.options, prepared.out)
        return stream.dry_run(prepared.model, prepared.plans)


@dataclass(frozen=True)
class _Single:
    """One model and what to write of it."""

    model: ExportModel
    plans: Sequence[stream.Plan]


@dataclass(frozen=True)
class _Bundle:
    """Several models, whose adapters go into one directory."""

    models: Sequence[ExportModel]
    options: Any
    out: Path


def _prepare(request: ExportRequest, progress: Progress, stack: ExitStack, *, dry_run: bool) -> _Single | _Bundle:
    """Everything up to the first byte: options are checked before models are opened."""
    if not request.targets:
        raise UsageError("no --target given", f"one or more of {', '.join(sinks.target_names())}")
    targets = {name: sinks.find(name) for name in request.target_names()}
    options = request.target_options()
    planned = sinks.plan_options(targets, request.quants, options)
    after_export.refuse(request, [target for target, _ in planned])
    if "adapter" in targets and find_spec("vllm"):
        progress.note("adapter: vLLM, which is installed, is asked: loading it takes some seconds")
    if len(request.sources) > 1 and not request.adapters:
        if request.shards:
            raise UsageError(f"--shards {request.shards}: a bundle is written by one process", "leave it out")
        return _prepare_bundle(request, planned, progress, stack)

    if request.shards:
        place = shared_export.WorkerPlace.parse(request.shards)
        shared_export.refuse([(name, targets[name], chosen) for name, chosen in planned], place)

    def check(home: Path) -> None:
        if request.shards:  # what stands there may be this very export
            return
        for target, chosen in planned:
            staging.refuse((request.out or home) / _folder(target, chosen), overwrite=request.overwrite)

    if request.calibrate and not dry_run:
        progress.note(f"calibrating on {request.calibrate}: loading the libraries")
    model, home = open_source(request.sources, request, progress, stack, check)
    options |= export_calibration.prepare(planned, targets, model, home, request, progress, dry_run=dry_run)
    return _Single(model, _plans(targets, request, options, request.out or home))


def _plans(
    targets: Mapping[str, Exporter], request: ExportRequest, options: Mapping[str, Any], folder: Path
) -> list[stream.Plan]:
    planned = sinks.plan_options(targets, request.quants, options)
    return [stream.Plan(name, targets[name], chosen, folder / _folder(name, chosen)) for name, chosen in planned]


def _folder(target: str, options: Any) -> str:
    quant = getattr(options, "quant", None)
    return f"{target}-{quant}" if quant else target


def _prepare_bundle(
    request: ExportRequest, planned: Sequence[tuple[str, Any]], progress: Progress, stack: ExitStack
) -> _Bundle:
    """Several runs: their adapters together, for one server."""
    count = len(request.sources)
    if [target for target, _ in planned] != ["adapter"]:
        raise UsageError(
            f"{count} runs given, expected one: only --target adapter, alone, takes several",
            "to merge several adapters into one model: --adapter A --adapter B --base BASE",
        )
    if request.name:
        raise UsageError(f"--name {request.name} with {count} runs: each adapter keeps its run's name")
    if request.out:
        staging.refuse(request.out, overwrite=request.overwrite)
    models = [open_source((source,), request, progress, stack, lambda _: None)[0] for source in request.sources]
    out = request.out or Path("exports") / "+".join(model.name for model in models)
    staging.refuse(out, overwrite=request.overwrite)
    return _Bundle(models, planned[0][1], out)
