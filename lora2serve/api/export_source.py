"""From what the user names to the opened model, and where its exports go by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lora2serve.adapters.adapter import read_config
from lora2serve.adapters.kind_targets import as_named, refuse_targets
from lora2serve.adapters.trained_tokens import refuse_new_tokens
from lora2serve.api.export_request import ExportRequest, Named
from lora2serve.api.locate import base_of_adapter, base_of_run, fetch, locate
from lora2serve.api.registered import exports_home
from lora2serve.artifacts.manifest import ADAPTER_TARGETS
from lora2serve.errors import UsageError
from lora2serve.exporting import open_model as models
from lora2serve.exporting.sinks import ExportModel
from lora2serve.progress import Progress
from lora2serve.system import scratch
from lora2serve.system.hub_snapshot import short_name

CheckFolder = Callable[[Path], None]


def open_source(
    sources: Sequence[Named], request: ExportRequest, progress: Progress, stack: ExitStack, check: CheckFolder
) -> tuple[ExportModel, Path]:
    """The model to export and the folder for its exports; ``stack`` keeps what must not outlive the export.

    ``check`` gets that folder before the model is opened.
    """
    if request.adapters:
        if sources:
            raise UsageError(
                "--adapter with a RUN: expected one of the two", "name the run's adapter directory with --adapter"
            )
        return _open_adapters(request.adapters, request, progress, stack, check)
    source = locate(sources[0] if sources else None, progress, pickle=request.allow_pickle)
    if source.run:
        home = exports_home(source.run)
        check(home)
        _refuse_kinds([source.run.adapter], request)
        base, _ = base_of_run(source.run.record.base, request.base, progress)
        _refuse_new_tokens([source.run.adapter], base, request)
        return models.open_run(source.run, base, request.open_options(), progress), home
    if source.is_adapter:
        return _open_adapters((source.path,), request, progress, stack, check)
    home = Path("exports") / short_name(source.path)
    check(home)
    return models.open_plain(source.path, source.name, request.open_options()), home


def _open_adapters(
    adapters: Sequence[Named], request: ExportRequest, progress: Progress, stack: ExitStack, check: CheckFolder
) -> tuple[ExportModel, Path]:
    paths = [fetch(name, progress, pickle=request.allow_pickle) for name in adapters]
    if request.allow_pickle:
        from lora2serve.adapters.pickles import convert

        paths = [convert(path, _scratch(stack)) for path in paths]
    home = Path("exports") / short_name(paths[0])
    check(home)
    _refuse_kinds(paths, request)
    base = base_of_adapter(paths[0], request.base)
    local = fetch(base, progress)
    _refuse_new_tokens(paths, local, request)
    _warn_of_quantized(local, base, progress)
    if request.combine:
        from lora2serve.adapters.combine import combine
        from lora2serve.weights.checkpoint import Checkpoint

        weights = request.weights or (1.0,) * len(paths)
        checkpoint = Checkpoint(local)
        paths = [combine(paths, checkpoint, request.combine, weights, request.density, _scratch(stack))]
    return models.open_adapters(paths, local, base, request.open_options()), home


def _refuse_kinds(adapters: Sequence[Path], request: ExportRequest) -> None:
    """AdapterError for a kind of adapter that a target cannot hold, before its base is looked for."""
    kinds = [(str(path), str(read_config(path).get("peft_type", "LORA")).upper()) for path in adapters]
    refuse_targets(kinds, request.target_names(), as_lora=bool(request.as_lora_rank))


def _refuse_new_tokens(adapters: Sequence[Path], base: Path, request: ExportRequest) -> None:
    """AdapterError for new tokens in a target that has no tokenizer."""
    beside = [as_named(target) for target in request.target_names() if target in ADAPTER_TARGETS]
    for path in adapters:
        refuse_new_tokens(path, base, beside)


def _scratch(stack: ExitStack) -> Path:
    return Path(stack.enter_context(scratch.temporary_folder("adapter")))


def _warn_of_quantized(local: Path, name: str, progress: Progress) -> None:
    from lora2serve.weights.checkpoint import read_config

    if read_config(local).get("quantization_config"):
        progress.warn(f"{name} is quantized: folding onto its dequantized weights; --base names the 16-bit model")
