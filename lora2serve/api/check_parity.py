"""``lora2serve.parity``: every export in its real engine, against the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora2serve.api.export_request import Named, several
from lora2serve.api.locate import Located, base_of_adapter, base_of_run, fetch, find_export, find_run, locate
from lora2serve.api.parity_request import ParityRequest
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
from lora2serve.parity_check.parity_plan import ParityPlan, of_engines, of_settings
from lora2serve.parity_check.trained_model import TrainedModel
from lora2serve.progress import Progress
from lora2serve.system import scratch
from lora2serve.system.small_files import plain_path

if TYPE_CHECKING:
    from lora2serve.data.data_sets import DataSet


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
    request = ParityRequest(
        model=model, exports=several(exports), base=base, data=data, engines=several(engines), require=several(require),
        thresholds=thresholds or {}, url=url, url_model=url_model, ask=ask, baseline=baseline, gate=gate,
        allow=several(allow), report_dir=report_dir,
    )  # fmt: skip
    return run_parity(request, progress)


@checked
def run_parity(request: ParityRequest, progress: Progress | None = None) -> ParityResult:
    """``parity``, with its arguments in one value."""
    progress = progress or default_progress()
    prepared = _prepare(request, progress)
    report, page = (_compare_settings if request.gate else _compare)(prepared, request, progress)
    return ParityResult(report, page, tuple(prepared.exports))


@checked
def plan_parity(request: ParityRequest, progress: Progress | None = None) -> ParityPlan:
    """What ``parity`` would compare, ask and write; starts no engine and writes nothing.

    request: the arguments of ``parity`` in one value.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises what ``parity`` would refuse before an engine starts; what is known to fail later is in ``ParityPlan.unmet``.
    """
    from lora2serve.parity_check.baseline import lost
    from lora2serve.parity_check.comparisons import refuse_impossible
    from lora2serve.parity_check.report import writers

    prepared = _prepare(request, progress or default_progress(), weights=False)
    trained, compared, page = prepared.trained, prepared.compared, prepared.place / writers.PAGE
    writers.refuse(prepared.place)
    if request.gate:
        return of_settings(trained, prepared.exports, page)
    refuse_impossible(trained, compared)
    scratch.try_folder(trained.home)
    plan = replace(of_engines(trained, compared, prepared.held_out, page), ask=request.ask)
    if prepared.earlier is None:
        return plan
    missing = lost([(each.name, each.engine) for each in compared], prepared.earlier, str(request.baseline))
    return replace(plan, baseline=str(request.baseline), lost=missing, unmet=(*plan.unmet, *missing))


@dataclass(frozen=True)
class _PreparedParity:
    """What is compared, and where the report goes; ``held_out`` rows and an ``earlier`` report if there are any."""

    trained: TrainedModel
    exports: Sequence[Path]
    compared: Sequence[Comparison]
    place: Path
    held_out: DataSet | None = None
    earlier: ParityReport | None = None


def _prepare(request: ParityRequest, progress: Progress, *, weights: bool = True) -> _PreparedParity:
    """Everything up to the first engine; ``weights``: also those of the Hub, which engines need."""
    from lora2serve.data.prompts import read_held_out
    from lora2serve.parity_check import comparisons
    from lora2serve.parity_check.baseline import read_baseline

    named = _directories(request.model, request.exports)
    trained, paths = _find(*named, request.base, progress, foreign=request.gate is not None, weights=weights)
    trained = replace(trained, settings=_settings(trained.settings, request))
    trained = replace(trained, rows=Path(request.data) if request.data else trained.rows)
    place = plain_path(Path(request.report_dir)) if request.report_dir else trained.home
    if request.gate:  # the report of all gates, which `push` looks at, stays as it is
        return _PreparedParity(trained, paths, (), place if request.report_dir else place / request.gate)
    compared = comparisons.of_exports(trained, paths)
    if request.url:
        compared.append(comparisons.of_url(trained, request.url, request.url_model))
    _refuse_unused(request.require, [comparison.engine for comparison in compared])
    earlier = read_baseline(Path(request.baseline)) if request.baseline else None
    held_out = read_held_out(trained.rows, trained.reading) if trained.rows else None
    return _PreparedParity(trained, paths, compared, place, held_out, earlier)


def _directories(model: Named | None, exports: Sequence[Named]) -> tuple[Named | None, Sequence[Named]]:
    """Versions of a registry by their directories; of one without a run, its exports too."""
    if model is None:
        return None, [directory_of(name) for name in exports]
    if not exports and (version := registered_version(model)) and not version.export:
        exports = exports_of([model])
    return directory_of(model), [directory_of(name) for name in exports]


def _compare(prepared: _PreparedParity, request: ParityRequest, progress: Progress) -> tuple[ParityReport, Path]:
    trained, compared, earlier = prepared.trained, prepared.compared, prepared.earlier
    count = f"{len(compared)} comparison{'' if len(compared) == 1 else 's'}"
    progress.note(f"parity of {trained.name}: {count}; loading the libraries")
    from lora2serve.parity_check.baseline import regressions
    from lora2serve.parity_check.comparator import check
    from lora2serve.parity_check.report import writers

    with writers.reserved(prepared.place):
        report = check(trained, compared, progress=progress, ask=request.ask)
        if earlier:
            report = replace(report, regressions=regressions(report, earlier, str(request.baseline)))
        page = writers.write(report, prepared.place)
    record_parity(trained.run, [each.path for each in compared if each.path])
    return report, page


def _compare_settings(
    prepared: _PreparedParity, request: ParityRequest, progress: Progress
) -> tuple[ParityReport, Path]:
    from lora2serve.parity_check import settings_check
    from lora2serve.parity_check.report import writers

    with writers.reserved(prepared.place):
        report = settings_check.report(prepared.trained, prepared.exports, progress)
        return report, writers.write(report, prepared.place)


def _find(
    model: Named | None, exports: Sequence[Named], base: Named | None, progress: Progress, *, foreign: bool,
    weights: bool,
) -> tuple[TrainedModel, list[Path]]:  # fmt: skip
    """The trained model and its exports, from what the user named of the two; ``foreign``: also of other tools."""
    if model is None:
        model = exports[0] if exports else runs.latest().path
        exports = exports[1:]
    if (Path(model) / MANIFEST).is_file():
        paths = [find_export(export) for export in (model, *exports)]
        run = trained_model.run_of(paths[0])
        trained = _of_run(run, base, progress, weights) if run else _of_manifest(paths, base, progress, weights)
    else:
        trained = find_trained(str(model), base, progress, weights=weights)
        paths = [_find_any(export) if foreign else find_export(export) for export in exports]
        paths = paths or _default_exports(trained)
    trained_model.refuse_others(trained, paths, weights=weights)
    return trained, paths


def _find_any(name: Named) -> Path:
    """A directory, whoever made it."""
    return Path(name) if Path(name).is_dir() else find_export(name)


def _default_exports(trained: TrainedModel) -> list[Path]:
    """Where ``export`` puts them by default."""
    if trained.run:
        return trained.run.list_exports()
    return sorted(path.parent for path in trained.home.parent.glob(f"*/{MANIFEST}"))


def _of_run(run: Run, base: Named | None, progress: Progress, weights: bool) -> TrainedModel:
    return trained_model.of_run(run, base_of_run(run.record.base, base, progress, weights=weights)[0])


def _of_manifest(exports: Sequence[Path], base: Named | None, progress: Progress, weights: bool) -> TrainedModel:
    """An export without a run: its manifest names the adapters and the base."""
    record, adapters = trained_model.parts_of(exports)
    local, _ = base_of_run(record, base, progress, weights=weights)
    name = (adapters[0] if adapters else local).resolve().name
    return trained_model.of_parts(name, local, adapters, exports[0].resolve().parent / "parity")


def find_trained(name: str, base: Named | None, progress: Progress, *, weights: bool = True) -> TrainedModel:
    """What is measured against: a run, an adapter directory or a plain model, by path, name or Hub id.

    Without ``weights`` only small files come from the Hub.
    """
    if find_run(name) is None and Path(name).exists():
        here = Located(Path(name), name)
        if not here.is_adapter and not (here.path / "config.json").is_file():
            raise UsageError(
                f"{name}: not a run, export, adapter or model", "name what was trained, or an export of it"
            )
    source = locate(name, progress, weights=weights)
    if source.run:
        return _of_run(source.run, base, progress, weights)
    short = source.path.resolve().name
    home = Path("exports") / short / "parity"
    if not source.is_adapter:
        return trained_model.of_parts(short, source.path, (), home)
    local = fetch(base_of_adapter(source.path, base), progress, weights=weights)
    return trained_model.of_parts(short, local, (source.path,), home)


def _settings(recipe: ParityRecipe, request: ParityRequest) -> ParityRecipe:
    """The recipe's ``parity`` section with the arguments over it."""
    from lora2serve.parity_check.comparisons import check_names

    bounds = {name: dict(figures) for name, figures in recipe.thresholds.items()}
    for path, bound in request.thresholds.items():
        kind, _, figure = path.rpartition(".")
        bounds.setdefault(kind, {})[figure] = float(bound)
    settings = replace(
        recipe, thresholds=bounds, engines=request.engines or recipe.engines,
        require=request.require or recipe.require, allow=(*recipe.allow, *request.allow),
    )  # fmt: skip
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
