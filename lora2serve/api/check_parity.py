"""``lora2serve.parity``: every export in its real engine, against the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora2serve.api.export_request import Named, several
from lora2serve.api.locate import Located, base_of_adapter, base_of_run, fetch, find_export, find_run, locate
from lora2serve.api.registered import directory_of, exports_of, record_parity, registered_version
from lora2serve.artifacts import run as runs
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.parity_report import ParityReport
from lora2serve.artifacts.run import Run
from lora2serve.config.arguments import checked
from lora2serve.config.recipe import ParityRecipe
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.parity_check import trained_model
from lora2serve.parity_check.comparisons import Comparison
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.progress import Progress
from lora2serve.system.small_files import plain_path


@dataclass(frozen=True)
class ParityResult:
    """The report, and the page that shows it; report.json, report.xml and summary.md lie beside the page."""

    report: ParityReport
    page: Path
    exports: tuple[Path, ...]

    @property
    def met(self) -> bool:
        """Whether every export answers like the trained model."""
        return self.report.met

    @property
    def answers(self) -> Mapping[str, str]:
        """Who answered what to the question ``ask``."""
        return self.report.question.answers


@checked
def parity(
    model: Named | None = None, exports: Named | Sequence[Named] = (), *,
    base: Named | None = None, data: Named | None = None,
    engines: str | Sequence[str] = (), require: str | Sequence[str] = (), thresholds: Mapping[str, float] | None = None,
    url: str | None = None, url_model: str | None = None, ask: str = "", baseline: Named | None = None,
    gate: Literal["settings"] | None = None, allow: str | Sequence[str] = (),
    report_dir: Named | None = None, progress: Progress | None = None,
) -> ParityResult:  # fmt: skip
    """Compare exports with the trained model, each in its real engine, and write a report.

    model: a run, an adapter directory, a plain model, or a Hub id of one of these; ``runs/latest`` by default. An
        export here is taken as the first of ``exports``: its manifest says what it was made from.
    exports: export directories; all of the model's by default.
    base, data: the base (default: the one trained on), and a file of held-out rows (default: the run's).
    engines, require: the only engines to ask; those that must be installed.
    thresholds: other bounds, such as ``{"Q4_K_M.mean_kl": 0.1, "all.top1": 0.9}``.
    url, url_model: a running deployment to compare as well: its OpenAI-compatible address, the model's name there.
    ask: a question that the base, the trained model and every export answer: see ``ParityResult.answers``.
    baseline: an earlier report.json: what got worse beyond noise counts as not met.
    gate: "settings" compares all that lies beside the weights, in seconds and without an engine, and nothing else.
    allow: settings that differ on purpose, such as ``"generation_config.json:temperature"``; ``*`` stands for any text.
    report_dir: where the report goes; the run's ``parity/``, or ``parity/`` beside the exports, by default.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    The result says in ``met`` whether parity holds; an engine that fails is a row of the report, not an error.
    Raises UsageError and InputError for what cannot be compared, HubError for what cannot be fetched.
    """
    from lora2serve.parity_check import comparisons

    progress = progress or default_progress()
    _refuse_unasked(gate, engine=engines, require=require, threshold=thresholds, url=url, url_model=url_model, ask=ask,
                    data=data, baseline=baseline)  # fmt: skip
    trained, paths = _find(*_directories(model, several(exports)), base, progress, foreign=gate is not None)
    settings = _settings(trained.settings, thresholds or {}, several(engines), several(require))
    settings = replace(settings, allow=(*settings.allow, *several(allow)))
    trained = replace(trained, settings=settings, rows=Path(data) if data else trained.rows)
    if gate:
        report, page = _compare_settings(trained, paths, report_dir, progress)
        return ParityResult(report, page, tuple(paths))
    compared = comparisons.of_exports(trained, paths)
    if url:
        compared.append(comparisons.of_url(trained, url, url_model))
    _refuse_unused(several(require), [comparison.engine for comparison in compared])
    report, page = _compare(trained, compared, ask, baseline, report_dir, progress)
    return ParityResult(report, page, tuple(paths))


def _directories(model: Named | None, exports: Sequence[Named]) -> tuple[Named | None, Sequence[Named]]:
    """Versions of a registry by their directories; of one without a run, its exports too."""
    if model is None:
        return None, [directory_of(name) for name in exports]
    if not exports and (version := registered_version(model)) and not version.export:
        exports = exports_of([model])
    return directory_of(model), [directory_of(name) for name in exports]


def _compare(
    trained: TrainedModel, compared: Sequence[Comparison], ask: str, baseline: Named | None, report_dir: Named | None,
    progress: Progress,
) -> tuple[ParityReport, Path]:  # fmt: skip
    progress.note(f"parity of {trained.name}: {len(compared)} comparisons; loading the libraries")
    from lora2serve.parity_check.baseline import read_baseline, regressions
    from lora2serve.parity_check.comparator import check
    from lora2serve.parity_check.report import writers

    place = plain_path(Path(report_dir)) if report_dir else trained.home
    earlier = read_baseline(Path(baseline)) if baseline else None
    with writers.reserved(place):
        report = check(trained, compared, progress=progress, ask=ask)
        if earlier:
            report = replace(report, regressions=regressions(report, earlier, str(baseline)))
        page = writers.write(report, place)
    record_parity(trained.run, [each.path for each in compared if each.path])
    return report, page


def _compare_settings(
    trained: TrainedModel, paths: Sequence[Path], report_dir: Named | None, progress: Progress
) -> tuple[ParityReport, Path]:
    """The report has a folder of its own: the one of all gates is what `push` looks at."""
    from lora2serve.parity_check import settings_check
    from lora2serve.parity_check.report import writers

    place = plain_path(Path(report_dir)) if report_dir else trained.home / "settings"
    with writers.reserved(place):
        report = settings_check.report(trained, paths, progress)
        return report, writers.write(report, place)


def _refuse_unasked(gate: str | None, **options: object) -> None:
    """UsageError for what only engines answer, where none is asked."""
    given = [name.replace("_", "-") for name, value in options.items() if value]
    if gate and given:
        raise UsageError(f"--gate {gate} with --{given[0]}: the settings are compared without an engine")


def _find(
    model: Named | None, exports: Sequence[Named], base: Named | None, progress: Progress, *, foreign: bool = False
) -> tuple[TrainedModel, list[Path]]:
    """The trained model and its exports, from what the user named of the two; ``foreign``: also of other tools."""
    if model is None:
        model = exports[0] if exports else runs.latest().path
        exports = exports[1:]
    if (Path(model) / MANIFEST).is_file():
        paths = [find_export(export) for export in (model, *exports)]
        run = trained_model.run_of(paths[0])
        trained = _of_run(run, base, progress) if run else _of_manifest(paths, base, progress)
    else:
        trained = find_trained(str(model), base, progress)
        paths = [_find_any(export) if foreign else find_export(export) for export in exports]
        paths = paths or _default_exports(trained)
    trained_model.refuse_others(trained, paths)
    return trained, paths


def _find_any(name: Named) -> Path:
    """A directory, whoever made it."""
    return Path(name) if Path(name).is_dir() else find_export(name)


def _default_exports(trained: TrainedModel) -> list[Path]:
    """Where ``export`` puts them by default."""
    if trained.run:
        return trained.run.list_exports()
    return sorted(path.parent for path in trained.home.parent.glob(f"*/{MANIFEST}"))


def _of_run(run: Run, base: Named | None, progress: Progress) -> TrainedModel:
    return trained_model.of_run(run, base_of_run(run.record.base, base, progress)[0])


def _of_manifest(exports: Sequence[Path], base: Named | None, progress: Progress) -> TrainedModel:
    """An export without a run: its manifest names the adapters and the base."""
    record, adapters = trained_model.parts_of(exports)
    local, _ = base_of_run(record, base, progress)
    name = (adapters[0] if adapters else local).resolve().name
    return trained_model.of_parts(name, local, adapters, exports[0].resolve().parent / "parity")


def find_trained(name: str, base: Named | None, progress: Progress) -> TrainedModel:
    """What is measured against: a run, an adapter directory or a plain model, by path, name or Hub id."""
    if find_run(name) is None and Path(name).exists():
        here = Located(Path(name), name)
        if not here.is_adapter and not (here.path / "config.json").is_file():
            raise UsageError(
                f"{name}: not a run, export, adapter or model", "name what was trained, or an export of it"
            )
    source = locate(name, progress)
    if source.run:
        return _of_run(source.run, base, progress)
    short = source.path.resolve().name
    home = Path("exports") / short / "parity"
    if not source.is_adapter:
        return trained_model.of_parts(short, source.path, (), home)
    local = fetch(base_of_adapter(source.path, base), progress)
    return trained_model.of_parts(short, local, (source.path,), home)


def _settings(
    recipe: ParityRecipe, thresholds: Mapping[str, float], engines: tuple[str, ...], require: tuple[str, ...]
) -> ParityRecipe:
    """The recipe's ``parity`` section with the arguments over it."""
    from lora2serve.parity_check.comparisons import check_names

    bounds = {name: dict(figures) for name, figures in recipe.thresholds.items()}
    for path, bound in thresholds.items():
        kind, _, figure = path.rpartition(".")
        bounds.setdefault(kind, {})[figure] = float(bound)
    settings = replace(recipe, thresholds=bounds, engines=engines or recipe.engines, require=require or recipe.require)
    check_names("require", settings.require)
    return settings


def _refuse_unused(require: Sequence[str], engines: Sequence[str]) -> None:
    """An engine that is required, and that nothing here is compared in, could never fail."""
    unused = [name for name in require if name not in engines]
    if unused:
        raise UsageError(
            f"--require {','.join(unused)}: no export here is compared in it",
            f"here: {', '.join(dict.fromkeys(engines))}",
        )
