"""``calibrate``: the run's own data, or a file, as token ids for the targets that measure activations on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lora2serve.api.export_request import ExportRequest, accepts
from lora2serve.artifacts import run
from lora2serve.config import recipe
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.errors import UsageError
from lora2serve.exporting import sinks
from lora2serve.exporting.sinks import Calibration, Exporter, ExportModel
from lora2serve.progress import Progress

TRAIN = "train"  # what the run was trained on


def prepare(
    planned: Sequence[tuple[str, object]], targets: Mapping[str, Exporter], model: ExportModel, home: Path,
    request: ExportRequest, progress: Progress, *, dry_run: bool,
) -> dict[str, Any]:  # fmt: skip
    """The options that calibration gives to the targets: an importance matrix, or the data itself, or nothing."""
    known = set().union(*(accepts(exporter.Options) for exporter in targets.values()))
    if request.calibrate and not known & {"imatrix", "calibration"}:
        raise UsageError(f"--calibrate: not an option of {' '.join(f'--target {name}' for name in targets)}")
    if request.calibrate and "imatrix" not in known and not any(_is_calibrated(options) for _, options in planned):
        raise UsageError(
            f"--calibrate {request.calibrate}: nothing of this export is measured on data",
            "leave it out, or name a --quant that needs it: see `lora2serve export --help`",
        )
    options: dict[str, Any] = {}
    data = _find_data(model, home, request.calibrate, progress)
    if data and "calibration" in known:
        options["calibration"] = data
    if request.calibrate and "imatrix" in known:
        if request.imatrix or dry_run:
            other = "--imatrix" if request.imatrix else "--dry-run"
            raise UsageError(f"--calibrate with {other}: expected one of the two")
        options["imatrix"] = _importance_matrix(model, home, data, request, progress)
    return options


def _is_calibrated(options: object) -> bool:
    """Targets of other packages say so by their field alone."""
    return bool(getattr(options, "is_calibrated", hasattr(options, "calibration")))


def _find_data(model: ExportModel, home: Path, requested: str | Path | None, progress: Progress) -> Calibration | None:
    """The requested data, or else a run's own; None where there is neither."""
    own = run.is_run(home.parent)
    if not requested and not own:
        return None
    if requested == TRAIN and not own:
        raise UsageError("--calibrate train: this is not a run", "name a data file, such as data.jsonl")
    data = DataRecipe(train=str(requested or TRAIN))
    if own and requested in (None, TRAIN):
        data = recipe.load_section(run.Run(home.parent).recipe, DataRecipe)

    @cache
    def rows() -> Sequence[Sequence[int]]:
        from lora2serve.data.calibration import calibration_ids, tokenizer_of
        from lora2serve.hub import pin_data

        base = Path(model.lineage.base.path)
        return calibration_ids(data, tokenizer_of(model.adapter, base), base, pin_data, progress)

    return Calibration(" + ".join(source.path for source in data.sources("train")), rows, progress)


def _importance_matrix(
    model: ExportModel, home: Path, data: Calibration | None, request: ExportRequest, progress: Progress
) -> Path:
    """The importance matrix, kept beside the exports for the next time."""
    assert data
    file = (request.out or (home.parent if run.is_run(home.parent) else home)) / "imatrix.gguf"
    file.parent.mkdir(parents=True, exist_ok=True)
    matrix: Path = resolve_name(sinks.CALIBRATOR)(model, data.rows(), data.source, file, progress)
    progress.note(f"importance matrix: {matrix}")
    return matrix
