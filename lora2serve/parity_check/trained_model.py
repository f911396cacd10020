"""What an export is compared with: the run it comes from, or the adapters and the base that its manifest names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.parity_report import ReferenceName
from lora2serve.artifacts.run import Run, is_run
from lora2serve.artifacts.run_record import QuantizationRecord
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.config.recipe import ParityRecipe, load_section
from lora2serve.data.prompts import PromptOptions, Reading
from lora2serve.errors import InputError, UsageError
from lora2serve.system.small_files import digest

if TYPE_CHECKING:
    from lora2serve.exporting.sinks import ExportModel

TOKENIZER = "tokenizer_config.json"
BUNDLE = "bundle"


@dataclass(frozen=True)
class TrainedModel:
    """The trained model: a base and the adapters over it, in that order; with none, the base is the model."""

    name: str
    base: Path
    adapters: tuple[Path, ...]
    home: Path  # where the report goes
    quantization: QuantizationRecord | None = None  # of the base at training
    rows: Path | None = None  # held-out rows
    settings: ParityRecipe = field(default_factory=ParityRecipe)
    run: Run | None = None

    @property
    def references(self) -> tuple[ReferenceName, ...]:
        """What can be measured: the full-precision base, and the quantized one where training had it."""
        return ("original", "trained") if self.quantization else ("original",)

    @property
    def reading(self) -> Reading:
        """How the training read its rows; of a model without a run by default."""
        if not self.run:
            return Reading()
        data = load_section(self.run.recipe, DataRecipe)
        return Reading(data.form, data.columns, self.run.record.day, self.rows == self.run.eval_data)

    @property
    def amount(self) -> PromptOptions:
        """How much is asked."""
        asked = self.settings
        return PromptOptions(asked.tokens, asked.window, asked.long, asked.prompts, asked.new_tokens)

    @property
    def tokenizer(self) -> Path:
        """The directory of the trained tokenizer."""
        return next((path for path in reversed(self.adapters) if (path / TOKENIZER).is_file()), self.base)

    def peft_options(self, reference: ReferenceName) -> dict[str, object]:
        """What makes the engine that computes it with nothing folded, on one of its bases."""
        return {
            "base": str(self.base),
            "adapters": [str(path) for path in self.adapters],
            "tokenizer": str(self.tokenizer),
            "quantization": self.quantization.to_json() if self.quantization and reference == "trained" else None,
            "trained_on": self.run.record.device if self.run else None,
        }

    def json(self) -> dict[str, Any]:
        """For a child process."""
        return {
            "base": str(self.base),
            "adapters": [str(path) for path in self.adapters],
            "run": str(self.run.path) if self.run else None,
            "name": self.name,
        }


def of_run(run: Run, base: Path) -> TrainedModel:
    """Everything is in the run."""
    return TrainedModel(
        name=run.name,
        base=base,
        adapters=(run.adapter,),
        home=run.parity,
        quantization=run.record.quantization,
        rows=run.eval_data if run.eval_data.is_file() else None,
        settings=load_section(run.recipe, ParityRecipe),
        run=run,
    )


def of_parts(name: str, base: Path, adapters: Sequence[Path], home: Path) -> TrainedModel:
    """Adapters on a full-precision base, or a plain model: what was held out at training is not known."""
    return TrainedModel(name, base, tuple(adapters), home)


def run_of(export: Path) -> Run | None:
    """The run that an export was made from: the one it lies in, or the one its adapter lies in."""
    adapter = Manifest.read(export).adapter
    candidates = [export.resolve().parent.parent, *([Path(adapter.path).parent] if adapter and adapter.path else [])]
    return next((Run(candidate) for candidate in candidates if is_run(candidate)), None)


def parts_of(exports: Sequence[Path]) -> tuple[BaseRecord, tuple[Path, ...]]:
    """The base on record and the adapters of exports without a run; all must come from the same ones."""
    parts: dict[Path, tuple[BaseRecord, tuple[Path, ...]]] = {}
    for export in exports:
        manifest = Manifest.read(export)
        if manifest.target == BUNDLE:
            each = "; ".join(f"lora2serve parity {export}/adapters/{name}" for name in manifest.bundle)
            raise UsageError(f"{export}: a bundle: each adapter in it has its own run", each)
        parts[export] = (manifest.base, tuple(Path(adapter.path) for adapter in manifest.adapters))
    first, (base, adapters) = next(iter(parts.items()))
    for export, (other, others) in parts.items():
        if (other.id, others) != (base.id, adapters):
            raise UsageError(f"{first} and {export} were made from different models", "compare them one after another")
    for path in adapters:
        if not path.is_dir():
            raise InputError(
                f"{first}: the adapter it was made from is missing: {path}",
                "name it first: `lora2serve parity ADAPTER EXPORT`",
            )
    return base, adapters


def refuse_others(origin: TrainedModel, exports: Sequence[Path], *, weights: bool = True) -> None:
    """InputError for an export whose adapter is not the one at hand: its manifest has the adapter's sha256.

    ``weights``: those of an adapter of the Hub were fetched, and must be there.
    """
    for export in exports:
        if not (export / MANIFEST).is_file():  # another tool's; only its settings can be compared
            continue
        recorded = [adapter.sha256 for adapter in Manifest.read(export).adapters]
        if len(recorded) != len(origin.adapters):
            raise InputError(
                f"{export}: made from {_counted(recorded)}, and {origin.name} is {_counted(origin.adapters)}",
                "name the export alone: its manifest says what it was made from",
            )
        for path, expected in zip(origin.adapters, recorded, strict=True):
            for name, sha256 in expected.items():
                if not weights and not (path / name).is_file():
                    continue
                if not (path / name).is_file() or digest(path / name)["sha256"] != sha256:
                    raise InputError(
                        f"{export}: made from another adapter than {path} ({name} differs)",
                        "it was trained again since: export again, or name the adapter it was made from",
                    )


def _counted(adapters: Sequence[object]) -> str:
    return {0: "a model without adapter", 1: "one adapter"}.get(len(adapters), f"{len(adapters)} adapters")


def open_model(origin: Mapping[str, Any], manifest: Manifest) -> ExportModel:
    """The model that an export was planned from, folded again; ``origin`` is ``Origin.json()``."""
    from lora2serve.exporting import open_model as models
    from lora2serve.progress import Silent

    base, adapters = Path(origin["base"]), [Path(path) for path in origin["adapters"]]
    choice = models.OpenOptions(
        dtype=_dtype_option(manifest), allow_base_mismatch=bool(manifest.base_mismatch), name=manifest.name or None
    )
    if origin["run"]:
        chosen = replace(choice, merge_base=manifest.merge_base or "auto")
        model = models.open_run(Run(Path(origin["run"])), base, chosen, Silent())
        return replace(
            model, lineage=replace(model.lineage, run=manifest.run)
        )  # its directory may have another name now
    if adapters:
        return models.open_adapters(adapters, base, manifest.base.id or str(base), choice)
    return models.open_plain(base, manifest.base.id or str(base), choice)


def _dtype_option(manifest: Manifest) -> str | None:
    """The ``--dtype`` of an export; one whose options are not on record says it by its type alone."""
    if manifest.options is not None:
        return str(manifest.options["dtype"]) if "dtype" in manifest.options else None
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(manifest.dtype or "")
