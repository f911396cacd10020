"""What a version was made from and with, as far as it is on record: in run.json, an adapter's config or a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lora2serve.adapters.adapter import CONFIG
from lora2serve.artifacts.json_record import JsonRecord, named
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import DataRecord
from lora2serve.artifacts.suite_scores import FOLDER, SuiteFigure, SuiteScores
from lora2serve.config.yaml_text import load_yaml
from lora2serve.errors import InputError
from lora2serve.system.small_files import digest, read_json

BASE_NAME = "base_model_name_or_path"  # of an adapter's config: where its base lies, rewritten by whoever moves it
HELD_OUT = "heldout"  # the suite of a run's own held-out rows


@dataclass(frozen=True)
class VersionFacts(JsonRecord):
    """Its lineage."""

    base: BaseRecord = field(default_factory=BaseRecord)
    data: DataRecord = field(default_factory=DataRecord)
    recipe: Mapping[str, object] = field(default_factory=dict)
    targets: tuple[str, ...] = ()  # modules
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionSettings:
    """What versions are found by."""

    run: str = ""
    base: str = ""  # its id
    base_sha256: str = ""  # of its config and of the names and shapes of its tensors; empty where they were not read
    method: str = ""  # LORA, LOHA, ...
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None
    steps: int | None = None
    rows: int | None = None  # that were trained on
    quantization: str = ""
    data: str = ""  # sha256 of each file of rows that were trained on

    def columns(self) -> dict[str, object]:
        """By the names of the table's columns."""
        return asdict(self)


def read_facts(run: Run | None, adapter: Path | None, manifests: Sequence[Manifest]) -> VersionFacts:
    """Those of a run, or of an adapter and its exports."""
    config = _peft_config(adapter)
    modules = config.target_modules
    targets = tuple(sorted(modules)) if isinstance(modules, tuple) else ()
    if run:
        record = run.record
        return VersionFacts(record.base, record.data, read_recipe(run.recipe), targets, record.device, record.versions)
    base = manifests[0].base if manifests else BaseRecord(id=config.base or "", revision=config.revision)
    return VersionFacts(base, targets=targets, versions=manifests[0].versions if manifests else {})


def read_settings(
    facts: VersionFacts, run: Run | None, adapter: Path | None, manifests: Sequence[Manifest]
) -> VersionSettings:
    """As ``read_facts``."""
    config = _peft_config(adapter)
    train, record = facts.recipe.get("train"), run.record if run else None
    rate = train.get("learning_rate") if isinstance(train, dict) else None
    return VersionSettings(
        run=(record.name if record else "") or (run.name if run else next((m.run for m in manifests if m.run), "")),
        base=facts.base.id,
        base_sha256=base_sum(facts.base),
        method=config.peft_type or "",
        rank=config.r if isinstance(config.r, int) else next((m.rank for m in manifests if m.rank), None),
        alpha=_number(config.lora_alpha),
        learning_rate=_number(rate),
        steps=record.steps if record else None,
        rows=facts.data.train.rows if facts.data.train else None,
        data=data_sums(facts),
        quantization=record.quantization.type if record and record.quantization else "",
    )


def read_scores(run: Run | None, created: str) -> list[SuiteScores]:
    """What was measured: the eval loss of a run, and what lies in its ``evals/``."""
    if run is None:
        return []
    scores = [SuiteScores.read(path) for path in sorted((run.path / FOLDER).glob("*.json"))]
    metrics = run.record.metrics
    loss = metrics.tuned_on_original or metrics.tuned
    if loss is None or not run.eval_data.is_file():
        return scores
    values = {"loss": loss.eval_loss, "perplexity": loss.perplexity}
    figures = {name: SuiteFigure(value, n=loss.tokens, higher_is_better=False) for name, value in values.items()}
    own = SuiteScores(
        suite=HELD_OUT, suite_sha256=digest(run.eval_data)["sha256"], engine="training", created=created,
        metrics=figures,
    )  # fmt: skip
    return [own, *scores]


def read_recipe(path: Path) -> Mapping[str, object]:
    """A run's recipe as JSON can have it, a date as its text; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(json.dumps(load_yaml(path.read_text(encoding="utf-8")), default=str))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {str(error)[:200]}", "the file is damaged") from None
    if not isinstance(content, dict):
        return {}
    return JsonRecord.from_json(content, str(path)).unknown


@dataclass(frozen=True)
class _PeftConfig(JsonRecord):
    """What is told of an adapter by its config."""

    base: str | None = named(BASE_NAME, None)
    revision: str | None = None
    peft_type: str | None = None
    r: int | None = None
    lora_alpha: int | float | None = None
    target_modules: tuple[str, ...] | str | None = None  # text is a pattern


def _peft_config(adapter: Path | None) -> _PeftConfig:
    """InputError with whatever in it no database takes."""
    if adapter is None:
        return _PeftConfig()
    return _PeftConfig.from_json(read_json(adapter / CONFIG, f"no {CONFIG}"), str(adapter / CONFIG))


def _number(value: object) -> float | None:
    """None for what is no number, or one that is none in 64 bits."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def data_sums(facts: VersionFacts) -> str:
    """The sha256 of each file of rows that it was trained on, spaces between."""
    train = facts.data.train
    sources = [train, *train.parts] if train else []
    return " ".join(source.sha256 for source in sources if source.sha256)


def base_sum(base: BaseRecord) -> str:
    """By what a base is known again wherever it lies; empty where it was not read."""
    config, tensors = base.fingerprint.config, base.fingerprint.tensors
    return hashlib.sha256(f"{config} {tensors}".encode()).hexdigest() if config and tensors else ""


def utc(moment: datetime) -> str:
    """A time as registries have it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
