"""From what the user names (a run, an adapter, a model) to the model that the sinks plan from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora2serve.adapters import soft_prompt
from lora2serve.adapters.adapter import CONFIG, WEIGHTS, Adapter, open_adapter
from lora2serve.adapters.target_presets import in_other_tower
from lora2serve.artifacts.lineage import AdapterRecord, BaseRecord, Lineage
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import RunRecord
from lora2serve.config.model_name import refuse_name
from lora2serve.errors import MergeError, UsageError
from lora2serve.exporting.prompt_files import put_in_front
from lora2serve.exporting.sinks import ExportModel, ModelSource
from lora2serve.merge.binding import Binder
from lora2serve.merge.merged import Merged
from lora2serve.merge.prompted import Prompted
from lora2serve.progress import Progress
from lora2serve.system.hub_snapshot import hub_snapshot, short_name
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.bnb.fake_quantized import FakeQuantized, Quantization
from lora2serve.weights.checkpoint import Checkpoint, content_hash, identity, model_dtype
from lora2serve.weights.dequantize import Dequantized
from lora2serve.weights.side_files import SideFiles, side_files
from lora2serve.weights.tensors import DType, Source

MergeBase = Literal["auto", "trained", "original"]
DTYPES: dict[str, DType] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class OpenOptions:
    """How to open: which base to fold onto, in which type, and what to let pass."""

    merge_base: MergeBase = "auto"
    dtype: str | None = None  # a key of DTYPES; None keeps the base's
    allow_base_mismatch: bool = False
    name: str | None = None
    folds: bool = True  # whether an output holds merged weights; False for adapters alone


def open_run(run: Run, base: Path, choice: OpenOptions, progress: Progress) -> ExportModel:
    """The model of a finished run; ``base`` is a local directory."""
    record = run.record
    if run.resumable:  # after its last step: there is an adapter, and no figure that says how good it is
        progress.warn(f"{run.path}: training was {run.resumable}")
    checkpoint = Checkpoint(base)
    mismatch = compare_base(record.base, base, checkpoint)
    if mismatch and not choice.allow_base_mismatch:
        raise MergeError(
            f"{base}: not the base of this run: {mismatch}", "--base names another; --allow-base-mismatch folds anyway"
        )
    merge_base, why = decide_merge_base(record, choice.merge_base)
    if choice.folds:
        progress.note(f"folding onto the {merge_base} base: {why}")
    source: Source = Dequantized(checkpoint)
    if merge_base == "trained" and record.quantization and not checkpoint.config.get("quantization_config"):
        names = Binder(list(source.specs()), checkpoint.config)
        how = Quantization.of(record.to_json())
        seen = [module for module in how.modules if not in_other_tower(module)]  # by the text that was trained
        source = FakeQuantized(source, replace(how, modules=seen), names)
    known = record.base if record.base.fingerprint.tensors else BaseRecord.from_json(identity(base), "base")
    lineage = Lineage(known, run.name, merge_base, mismatch or None)
    return _model(source, checkpoint, [open_adapter(run.adapter)], choice, choice.name or run.name, lineage)


def open_adapters(adapters: Sequence[Path], base: Path, base_name: str, choice: OpenOptions) -> ExportModel:
    """Adapter directories without a run, folded one after another onto ``base``."""
    if choice.merge_base == "trained":
        raise UsageError(
            "--merge-base trained: only a run of lora2serve knows which modules were quantized",
            "use --merge-base original",
        )
    checkpoint = Checkpoint(base)
    opened = [open_adapter(path) for path in adapters]
    name = choice.name or short_name(adapters[0])
    lineage = _lineage(base, base_name)
    return _model(Dequantized(checkpoint), checkpoint, opened, choice, name, lineage)


def open_plain(base: Path, base_name: str, choice: OpenOptions) -> ExportModel:
    """A model with nothing to fold."""
    checkpoint = Checkpoint(base)
    lineage = _lineage(base, base_name)
    return _model(Dequantized(checkpoint), checkpoint, [], choice, choice.name or short_name(base), lineage)


def decide_merge_base(record: RunRecord, wanted: MergeBase) -> tuple[Literal["trained", "original"], str]:
    """Which base to fold onto, and why in words.

    ``auto`` takes the base as trained where the held-out rows show that it suits the adapter better, else the original.
    """
    if not record.quantization:
        return "original", "it was trained without quantization"
    if wanted != "auto":
        return wanted, "as requested"
    if record.quantization.type == "fp4":  # by an earlier release, or the base came so
        return "original", "what fp4 made of the base is not computed again"
    trained, original = record.metrics.tuned, record.metrics.tuned_on_original
    if not trained or not original:
        return "original", "the adapter's eval loss there was not measured at training"
    losses = f"eval loss {original.eval_loss:.4f} on the original, {trained.eval_loss:.4f} on the trained"
    apart = record.metrics.tuned_less_tuned_on_original
    if not apart:  # of an earlier release
        return ("original" if original.eval_loss <= trained.eval_loss else "trained"), losses
    if apart.high < 0 or apart.low > 0:
        return ("trained" if apart.high < 0 else "original"), losses
    return "original", (
        f"the two do not differ beyond noise ({losses}; difference {apart.low:+.4f} to {apart.high:+.4f}, "
        f"95 % interval over {apart.rows} held-out rows)"
    )


def compare_base(record: BaseRecord, base: Path, checkpoint: Checkpoint) -> str:
    """In what ``base`` differs from the one on record, in words; empty where nothing does.

    Names and shapes first; then contents, unless size and time of every file are still those on record.
    """
    expected = record.fingerprint.tensors
    if not expected:
        return ""
    if identity(base, content=False)["fingerprint"]["tensors"] != expected:
        return "other tensor names or shapes"
    for name, sha256 in record.files.items():
        path = base / name
        if not path.is_file():
            return f"no file {name}"
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) != record.stat.get(name) and content_hash(path) != sha256:
            return f"other content in {name}"
    return ""


def _model(
    source: Source,
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    choice: OpenOptions,
    name: str,
    lineage: Lineage,
) -> ExportModel:
    refuse_name(name, "the model's name", "give another with --name", chosen=False)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    dtype = DTYPES[choice.dtype] if choice.dtype else None
    if dtype is None and model_dtype(config) is None:
        config["dtype"] = {"BF16": "bfloat16", "F16": "float16"}.get(source.specs()[0].dtype, "float32")
    adapter = adapters[0].path if adapters else None
    files = side_files(checkpoint.path, adapter)
    return ExportModel(
        source=_folded(source, adapters, config, dtype, files),
        files=files,
        name=name,
        base=lineage.base.id or str(checkpoint.path),
        adapter=adapter,
        dtype=choice.dtype,
        lineage=replace(lineage, adapters=tuple(adapter_record(adapter.path) for adapter in adapters)),
    )


def _folded(
    source: Source, adapters: Sequence[Adapter], config: JsonObject, dtype: DType | None, files: SideFiles
) -> ModelSource:  # fmt: skip
    """The base with its adapters; a soft prompt becomes tokens, in ``files``, too."""
    soft = [adapter for adapter in adapters if adapter.method in soft_prompt.KINDS]
    if not soft:
        return Merged(source, adapters, config, dtype)
    if len(adapters) > 1:
        names = ", ".join(str(adapter.path) for adapter in adapters)
        raise MergeError(f"{names}: a soft prompt and another adapter were not trained together", "export one of them")
    prompt = soft_prompt.soft_prompt_of(soft[0])
    prompted = Prompted(Merged(source, [], config, dtype), prompt)
    put_in_front(files, prompt.tokens, prompted.first, prompted.config)
    return prompted


def _lineage(base: Path, name: str) -> Lineage:
    """That of a model without a run; the weights' bytes are not read for it."""
    return Lineage(BaseRecord.from_json(identity(base, name, content=False), "base"), merge_base="original")


def adapter_record(adapter: Path) -> AdapterRecord:
    """Where that adapter lies, its repository if it is the Hub's, and by which sums it is known again."""
    pulled = hub_snapshot(adapter)
    sums = {name: content_hash(adapter / name) for name in (CONFIG, WEIGHTS)}
    path = str(adapter.resolve())
    return AdapterRecord(path, pulled.id, pulled.commit, sums) if pulled else AdapterRecord(path, sha256=sums)
