"""``--calibrate``: the run's own data, or a file, as token ids for the targets that measure activations on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.exporting.sinks import Calibration, Exporter, ExportModel
    from lora2serve.progress import Progress

TRAIN = "train"  # --calibrate train: what the run was trained on


def prepare(
    targets: Mapping[str, Exporter], model: ExportModel, home: Path, options: Mapping[str, Any], told: Progress
) -> dict[str, Any]:
    """The options that calibration gives to the targets: an importance matrix, or the data itself, or nothing."""
    takes = {field.name for exporter in targets.values() for field in fields(exporter.Options)}
    if options["calibrate"] and not takes & {"imatrix", "calibration"}:
        raise UsageError(f"--calibrate: not an option of {' '.join(f'--target {name}' for name in targets)}")
    found: dict[str, Any] = {}
    data = _find(model, home, options["calibrate"], told)
    if data and "calibration" in takes:
        found["calibration"] = data
    if options["calibrate"] and "imatrix" in takes:
        found["imatrix"] = _importance(model, home, data, options, told)
    return found


def _find(model: ExportModel, home: Path, asked: str | None, told: Progress) -> Calibration | None:
    """The data as asked; without a word a run's own. None where there is neither."""
    from lora2serve.artifacts import run
    from lora2serve.config import recipe
    from lora2serve.data.calibration import calibration_ids, tokenizer_of
    from lora2serve.exporting.sinks import Calibration

    own = run.is_run(home.parent)
    if not asked and not own:
        return None
    if asked == TRAIN and not own:
        raise UsageError("--calibrate train: this is no run", "name a data file, such as data.jsonl")
    wanted = recipe.DataRecipe(train=asked or TRAIN)
    if own and asked in (None, TRAIN):
        wanted = recipe.load_section(run.Run(home.parent).recipe, recipe.DataRecipe)

    @cache
    def rows() -> Sequence[Sequence[int]]:
        from lora2serve.hub import pin_data

        tokenizer = tokenizer_of(model.adapter, Path(model.lineage["base"]["path"]))
        return calibration_ids(wanted, tokenizer, pin_data, told)

    return Calibration(wanted.train, rows, told)


def _importance(
    model: ExportModel, home: Path, data: Calibration | None, options: Mapping[str, Any], told: Progress
) -> Path:
    """The importance matrix, kept beside the exports for the next time."""
    from lora2serve.artifacts import run
    from lora2serve.exporting import sinks as exporter

    if options["imatrix"] or options["plan_only"]:
        raise UsageError(f"--calibrate with {'--imatrix' if options['imatrix'] else '--plan'}: expected one of the two")
    assert data
    out = (options["out"] or (home.parent if run.is_run(home.parent) else home)) / "imatrix.gguf"
    out.parent.mkdir(parents=True, exist_ok=True)
    made: Path = exporter.load(exporter.CALIBRATOR)(model, data.rows(), data.source, out, told)
    told.note(f"importance matrix: {made}")
    return made
