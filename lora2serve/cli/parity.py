"""``lora2serve parity``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora2serve.cli.common import base_of, find_run, progress
from lora2serve.errors import ParityNotMet, UsageError

if TYPE_CHECKING:
    from lora2serve.parity.report import Report
    from lora2serve.recipe import ParityRecipe
    from lora2serve.run import Run


@click.command()
@click.argument("given", metavar="[RUN] [EXPORT]...", nargs=-1)
@click.option(
    "--report",
    "report_dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where the report goes (default: the run's parity/).",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.option("--ask", metavar="PROMPT", help="Also let the base, the trained model and every export answer this.")
@click.option("--base", metavar="MODEL", help="The base: a path or a Hub id (default: the one trained on).")
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
    """Compare every EXPORT of RUN (default: all of runs/latest) with the trained model, each in its real engine.

    Exit code 3 when one is further off than its format allows. Prints the report's path.
    """
    from lora2serve import console
    from lora2serve.parity import files, subjects
    from lora2serve.parity.baseline import regressions
    from lora2serve.parity.check import check

    run, exports = _find(given)
    told = progress(ctx)
    base, _ = base_of(run.record, options["base"], told)
    settings = _settings(run, options)
    compared = subjects.of_exports(run, exports, base, settings.window)
    if options["url"]:
        compared.append(subjects.of_url(run, options["url"], options["url_model"]))
    report = check(run, compared, base=base, settings=settings, progress=told, ask=options["ask"] or "")
    if options["baseline"]:
        report = replace(report, regressions=regressions(report, options["baseline"]))
    directory = options["report_dir"] or run.parity
    page = files.write(report, directory)
    if not ctx.find_root().obj["quiet"]:
        _show(report, exports)
    if options["as_json"]:
        console.result_json(report.json())
    else:
        console.result(str(page))
    if not report.met:
        raise ParityNotMet(_summary(report), f"{page} shows where")


def _find(given: tuple[str, ...]) -> tuple[Run, list[Path]]:
    """The run and its exports; an export alone belongs to the run it lies in, or to the one made last."""
    from lora2serve import run as runs

    first = given[0] if given else None
    if first is None or not (Path(first) / "lora2serve.json").is_file():
        run, paths = find_run(first), [Path(path) for path in given[1:]]
    else:
        paths = [Path(path) for path in given]
        home = paths[0].resolve().parent.parent
        run = runs.Run(home) if runs.is_run(home) else runs.latest()
    exports = paths or run.list_exports()
    missing = [str(path) for path in exports if not (path / "lora2serve.json").is_file()]
    if missing:
        raise UsageError(f"{', '.join(missing)}: no export", "name a directory that `lora2serve export` printed")
    return run, exports


def _settings(run: Run, options: dict[str, Any]) -> ParityRecipe:
    """The recipe's ``parity`` section with the command line over it."""
    from lora2serve import recipe

    settings = recipe.load(run.recipe).parity
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
    require = tuple(options["require"].split(",")) if options["require"] else settings.require
    return replace(settings, thresholds=thresholds, require=require)


def _show(report: Report, exports: list[Path]) -> None:
    from lora2serve import console
    from lora2serve.parity.words import figure

    sizes = {path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in exports}
    rows = []
    for row in report.subjects:
        figures = [figure(name, row.check(name)) for name in ("mean_kl", "top1", "equal_answers", "retention")]
        size = console.size(sizes[row.export]) if row.export in sizes else ""
        verdict = row.status if row.gate is None else f"{row.status}: {row.gate.cause or row.gate.first}"
        rows.append([row.export, size, row.engine, verdict, *(cell.replace("100.00%", "100%") for cell in figures)])
    columns = ["export", "size", "engine", "verdict", "mean KL", "top\ntoken", "same\nanswers", "signal\nkept"]
    styles = {number: "red" for number, row in enumerate(report.subjects) if row.red}
    console.table("", columns, rows, styles)
    if report.asked:
        console.table("", [report.asked["prompt"], "answer"], [list(pair) for pair in report.asked["answers"].items()])


def _summary(report: Report) -> str:
    red = [row for row in report.subjects if row.red]
    lines = [f"parity not met: {len(red)} of {len(report.subjects)} rows red"] if red else ["parity got worse"]
    for row in red:
        gate = row.gate
        assert gate is not None
        lines.append(f"{row.export} in {row.engine}: {gate.name}: {gate.cause}; first: {gate.first}")
    return "\n".join([*lines, *report.regressions])
