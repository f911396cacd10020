"""``lora2serve parity``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora2serve.cli.common import base_of, fetch, progress
from lora2serve.errors import ParityNotMet, UsageError

if TYPE_CHECKING:
    from lora2serve.artifacts.parity_report import ParityReport
    from lora2serve.parity_check.trained_model import TrainedModel
    from lora2serve.progress import Progress


@click.command(short_help="Compare exports with the trained model, in their engines.")
@click.argument("given", metavar="[MODEL] [EXPORT]...", nargs=-1)
@click.option(
    "--report",
    "report_dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where the report goes (default: the run's parity/, or parity/ beside the exports).",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.option("--ask", metavar="PROMPT", help="Also let the base, the trained model and every export answer this.")
@click.option("--base", metavar="MODEL", help="The base: a path or a Hub id (default: the one trained on).")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Held-out rows to score (default: the run's).",
)
@click.option("--engine", metavar="ENGINE,ENGINE", help="Ask these only; vllm-server starts the export's own server.")
@click.option("--require", metavar="ENGINE,ENGINE", help="Engines that must be there: a missing one is red.")
@click.option("--url", metavar="URL", help="Also compare a deployment that runs: its OpenAI-compatible address.")
@click.option("--url-model", metavar="NAME", help="The model's name at --url (default: the first it lists).")
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="FORMAT.FIGURE=BOUND",
    help="Another bound, such as Q4_K_M.mean_kl=0.1, or all.top1=0.9.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="REPORT",
    help="An earlier report.json: what got worse beyond noise is red.",
)
@click.pass_context
def parity(ctx: click.Context, /, given: tuple[str, ...], **options: Any) -> None:
    """Compare every EXPORT of MODEL with the trained model, each in its real engine.

    MODEL is a run, an adapter directory, a plain model, or a Hub id of one of these; without one, it is what the
    first EXPORT was made from. Without EXPORTs, all of MODEL's; without both, all of runs/latest.
    Exit code 3 when one is further off than its format allows, or no engine is there. Prints the report's path.
    """
    from lora2serve import console
    from lora2serve.parity_check import comparisons
    from lora2serve.parity_check.baseline import regressions
    from lora2serve.parity_check.comparator import check
    from lora2serve.parity_check.report import writers

    told = progress(ctx)
    origin, exports = _find(given, options, told)
    origin = _with_settings(origin, options)
    compared = comparisons.of_exports(origin, exports)
    if options["url"]:
        compared.append(comparisons.of_url(origin, options["url"], options["url_model"]))
    _refuse_unused(options["require"], [subject.engine for subject in compared])
    report = check(origin, compared, progress=told, ask=options["ask"] or "")
    if options["baseline"]:
        report = replace(report, regressions=regressions(report, options["baseline"]))
    directory = options["report_dir"] or origin.home
    page = writers.write(report, directory)
    if not ctx.find_root().obj["quiet"]:
        _show(report, exports)
    if options["as_json"]:
        console.result_json(report.to_json())
    else:
        console.result(str(page))
    if not report.met:
        raise ParityNotMet(_summary(report), f"{page} shows where")


def _find(given: tuple[str, ...], options: dict[str, Any], told: Progress) -> tuple[TrainedModel, list[Path]]:
    """The trained model and its exports, from what the user named of the two."""
    from lora2serve.artifacts import run as runs
    from lora2serve.parity_check import trained_model as origins

    first = given[0] if given else str(runs.latest().path)
    if (Path(first) / MANIFEST).is_file():
        exports = _exports(given)
        run = origins.run_of(exports[0])
        origin = _of_run(run, options, told) if run else _of_manifest(exports, options, told)
    else:
        origin = _of_model(first, options, told)
        exports = _exports(given[1:]) or _default_exports(origin)
    origins.refuse_others(origin, exports)
    return origin, exports


MANIFEST = "lora2serve.json"


def _exports(names: tuple[str, ...]) -> list[Path]:
    paths = [Path(name) for name in names]
    missing = [str(path) for path in paths if not (path / MANIFEST).is_file()]
    if missing:
        raise UsageError(f"{', '.join(missing)}: no export", "name a directory that `lora2serve export` printed")
    return paths


def _default_exports(origin: TrainedModel) -> list[Path]:
    """Where ``export`` puts them when it is not told."""
    if origin.run:
        return origin.run.list_exports()
    return sorted(path.parent for path in origin.home.parent.glob(f"*/{MANIFEST}"))


def _of_run(run: Any, options: dict[str, Any], told: Progress) -> TrainedModel:
    from lora2serve.parity_check import trained_model as origins

    return origins.of_run(run, base_of(run.record.base, options["base"], told)[0])


def _of_manifest(exports: list[Path], options: dict[str, Any], told: Progress) -> TrainedModel:
    """An export without a run: its manifest names the adapters and the base."""
    from lora2serve.parity_check import trained_model as origins

    record, adapters = origins.parts_of(exports)
    base, _ = base_of(record, options["base"], told)
    name = (adapters[0] if adapters else base).resolve().name
    return origins.of_parts(name, base, adapters, exports[0].resolve().parent / "parity")


def _of_model(name: str, options: dict[str, Any], told: Progress) -> TrainedModel:
    """A run, an adapter directory or a plain model, by path, by name under runs/, or by its Hub id."""
    from lora2serve.adapters.adapter import CONFIG, read_config
    from lora2serve.artifacts import run as runs
    from lora2serve.parity_check import trained_model as origins

    for place in (Path(name), runs.ROOT / name):
        if runs.is_run(place):
            return _of_run(runs.Run(place), options, told)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in (CONFIG, "config.json")):
        raise UsageError(f"{name}: no run, export, adapter or model", "name what was trained, or an export of it")
    path = fetch(name, told)
    short = path.resolve().name
    home = Path("exports") / short / "parity"
    if not (path / CONFIG).is_file():
        return origins.of_parts(short, path, (), home)
    base = options["base"] or read_config(path).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{path}: its config does not name a base", "name it with --base")
    return origins.of_parts(short, fetch(base, told), (path,), home)


def _with_settings(origin: TrainedModel, options: dict[str, Any]) -> TrainedModel:
    """The recipe's ``parity`` section with the command line over it."""
    from lora2serve.parity_check.comparisons import check_names

    settings = origin.settings
    thresholds = {name: dict(bounds) for name, bounds in settings.thresholds.items()}
    for text in options["thresholds"]:
        path, _, bound = text.partition("=")
        kind, _, figure = path.rpartition(".")
        try:
            thresholds.setdefault(kind, {})[figure] = float(bound)
        except ValueError:
            raise UsageError(
                f"--threshold {text}: expected FORMAT.FIGURE=NUMBER", "such as Q4_K_M.mean_kl=0.1"
            ) from None
    engines, require = _names(options["engine"]) or settings.engines, _names(options["require"]) or settings.require
    settings = replace(settings, thresholds=thresholds, engines=engines, require=require)
    check_names("require", settings.require)
    return replace(origin, settings=settings, rows=options["data"] or origin.rows)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def _refuse_unused(require: str | None, engines: list[str]) -> None:
    """``--require`` an engine that nothing here is compared in could never be red."""
    unused = [name for name in _names(require) if name not in engines]
    if unused:
        raise UsageError(
            f"--require {','.join(unused)}: no export here is compared in it",
            f"here: {', '.join(dict.fromkeys(engines))}",
        )


def _show(report: ParityReport, exports: list[Path]) -> None:
    from lora2serve import console
    from lora2serve.artifacts.metric_table import OVERVIEW

    sizes = {path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in exports}
    rows = []
    for row in report.rows:
        figures = [check.shown() if (check := row.check(name)) else "-" for name in OVERVIEW]
        size = console.size(sizes[row.export]) if row.export in sizes else ""
        verdict = row.status if row.gate is None else f"{row.status}: {row.gate.cause or row.gate.first}"
        rows.append([row.export, size, row.engine, verdict, *(cell.replace("100.00%", "100%") for cell in figures)])
    columns = ["export", "size", "engine", "verdict", "mean KL", "top\ntoken", "same\nanswers", "signal\nkept"]
    styles = {number: "red" for number, row in enumerate(report.rows) if row.red}
    console.table("", columns, rows, styles)
    if report.asked.prompt:
        console.table("", [report.asked.prompt, "answer"], [list(pair) for pair in report.asked.answers.items()])


def _summary(report: ParityReport) -> str:
    red = [row for row in report.rows if row.red]
    if red:
        lines = [f"parity not met: {len(red)} of {len(report.rows)} rows red"]
    else:
        lines = [
            "parity got worse" if report.regressions else "nothing was compared: no engine of these exports is here"
        ]
    for row in red or ([] if report.regressions else report.rows):
        gate = row.gate
        assert gate is not None
        lines.append(f"{row.export} in {row.engine}: {gate.name}: {gate.cause}; first: {gate.first}")
    return "\n".join([*lines, *report.regressions])
