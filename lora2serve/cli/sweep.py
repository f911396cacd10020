"""``lora2serve sweep``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import (
    Choice,
    Command,
    GroupedOption,
    complete_runs,
    dry_run_option,
    json_option,
    names,
    plain,
    progress,
)

if TYPE_CHECKING:
    from lora2serve.sweeping.sweep_plan import SweepPlan
    from lora2serve.sweeping.sweep_recipe import SweepResult
    from lora2serve.sweeping.sweep_report import SweepReport

EXAMPLES = [
    ("lora2serve sweep", "lora2serve.yaml here: six rates, all presets, ranks 8 to 64"),
    ("lora2serve sweep --dry-run --gpu 24", "what would be tried, how many trials at most, what fits into 24 GiB"),
    ("lora2serve sweep demo --fraction 0.3", "search on 30 % of the rows; the front again on all"),
    ("lora2serve sweep --budget 6h --constraint memory", "six hours, and the least memory that is good enough"),
    ("lora2serve sweep --suite medqa.yaml", "the best by its answers to a suite of yours, not by its loss"),
    ("lora2serve sweep --task medmcqa --limit 200", "the same by tasks of lm-evaluation-harness"),
    ("lora2serve sweep --space space.yaml --jobs 2", "your own lists of values; two trials at a time"),
    ("lora2serve sweep --storage postgresql://db/sweeps", "other machines may join"),
    ("lora2serve sweep --join sweeps/demo/sweep.db", "one more worker of that sweep"),
    ("lora2serve sweep --on ray", "one task for each trial, with a GPU each"),
]


@click.command(cls=Command, short_help="Search learning rate, layers and rank.", examples=EXAMPLES)
@click.argument("recipe", required=False, shell_complete=complete_runs)
@click.option(
    "--constraint",
    type=Choice(["quality", "memory", "time"]),
    default="quality",
    show_default=True,
    help="What is scarce, and so what to recommend.",
)
@click.option("--budget", metavar="TRIALS|TIME", help="At most so many trials (40), or so long (90m, 6h, 2d).")
@click.option(
    "--fraction",
    type=float,
    default=1.0,
    show_default=True,
    help="Of the training rows, for the search; its best are trained again on all.",
)
@click.option(
    "--space",
    type=click.Path(dir_okay=False, exists=True),
    metavar="FILE",
    help="YAML: fields of the recipe with lists of values.",
)
@click.option(
    "--margin",
    type=float,
    default=0.01,
    show_default=True,
    help="A change that is none: of the loss, as a share; of scores, 0.01 is a point.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field: train.steps=100.")
@click.option("--name", help="Of the folder under sweeps/ (default: the recipe's name).")
@click.option(
    "--suite", metavar="FILE|held-out", cls=GroupedOption, group="Quality",
    help="Judge by the scores of this suite, or of the answers to held-out rows, instead of the eval loss.",
)  # fmt: skip
@click.option(
    "--task", metavar="NAMES", callback=names, cls=GroupedOption, group="Quality",
    help="Judge by the scores of tasks of lm-evaluation-harness: arc_easy,medmcqa.",
)  # fmt: skip
@click.option(
    "--task-folder", metavar="FOLDER", type=click.Path(path_type=Path), cls=GroupedOption, group="Quality",
    help="More tasks for --task, in YAML.",
)  # fmt: skip
@click.option(
    "--shots", type=click.IntRange(min=0), metavar="N", cls=GroupedOption, group="Quality",
    help="--task: examples before each question.",
)  # fmt: skip
@click.option(
    "--chat", is_flag=True, cls=GroupedOption, group="Quality",
    help="--task: write questions by the chat template, as it is served.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", cls=GroupedOption, group="Quality",
    help="--task: only the first N rows of each.",
)  # fmt: skip
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Trials at a time (default: one for each GPU, or one).",
    cls=GroupedOption,
    group="Machine",
)
@click.option(
    "--gpu",
    metavar="NAME|GIB",
    default="",
    help="Trials must fit into this GPU, instead of this machine's.",
    cls=GroupedOption,
    group="Machine",
)
@click.option(
    "--storage",
    metavar="FILE|URL",
    help="sqlite, a journal (*.journal) or postgresql:// (default: sqlite in the folder).",
    cls=GroupedOption,
    group="Machine",
)
@click.option(
    "--join",
    metavar="FILE|URL",
    help="Work on the sweep in that storage, which was begun elsewhere.",
    cls=GroupedOption,
    group="Machine",
)
@click.option(
    "--on",
    type=Choice(["ray"]),
    help="Run trials as tasks of the Ray cluster at RAY_ADDRESS, or of the one here.",
    cls=GroupedOption,
    group="Machine",
)
@dry_run_option(help="Show what would be tried, and every refusal; train nothing, fetch no weights, write nothing.")
@json_option
@click.pass_context
def sweep(ctx: click.Context, /, dry_run: bool, as_json: bool, **options: object) -> None:
    """Find the learning rate, the layers and the rank for RECIPE by short trainings, and recommend a recipe.

    Each trial is a run in a process of its own, under sweeps/<name>/runs/. First rates and layers at one rank, the
    best for longer; then ranks, until a larger one brings nothing; then the front again, by three seeds, on rows that
    no trial has seen. The same command goes on with a sweep that was ended. Prints the recommended recipe.
    """
    from lora2serve import console
    from lora2serve.sweeping.sweep_plan import plan_sweep
    from lora2serve.sweeping.sweep_recipe import run_sweep
    from lora2serve.sweeping.sweep_request import SweepRequest

    request = SweepRequest(**options)  # type: ignore[arg-type]
    if dry_run:
        _show_plan(plan_sweep(request, progress(ctx)), as_json)
        return
    result = run_sweep(request, progress(ctx))
    if as_json:
        console.result_json(result.report.to_json())
        return
    show(result)
    console.result(str(result.recommended))


def _show_plan(plan: SweepPlan, as_json: bool) -> None:
    from lora2serve import console

    if as_json:
        console.result_json(plain(plan))
        return
    for line in console.aligned(list(_plan_lines(plan))):
        console.result(line)


def _plan_lines(plan: SweepPlan) -> Iterator[tuple[str, str]]:
    """What it is about, and what would be so."""
    from lora2serve.console import size

    for field, values in plan.space.items():
        yield field, ", ".join(map(_value, values))
    fits = f"{plan.fitting} fit" if plan.fitting is not None else "how many fit is not known"
    yield "points", f"{plan.points}; into {plan.gpu} ({size(plan.gpu_memory)}) {fits}"
    for misfit in plan.does_not_fit:
        yield "", f"{misfit.words} ({misfit.points}): {misfit.reason}"
    if plan.finished:
        yield "in all", "no trial more: that sweep is finished"
    else:
        yield from ((each.phase, f"{_trials(each.trials)} at most") for each in plan.phases)
        yield "in all", f"{_trials(plan.trials)} at most, {plan.jobs} at a time{_budget(plan)}"
    shares = " and ".join(f"1/{round(1 / share)}" for share in plan.rungs if share < 1)
    yield (
        "steps",
        f"{plan.steps} in the search" + (f", for the best of those that did {shares} of them" if shares else ""),
    )
    yield (
        "rows",
        f"{plan.rows} of {plan.all_rows} in the search (--fraction {plan.fraction:g}), all of them for the front",
    )
    if plan.search_rows:
        yield "held out", f"{plan.search_rows} rows for the search, {plan.final_rows} for the front"
    yield "judged by", plan.judged_by
    yield "folder", f"{plan.folder}{_begun(plan)}"
    yield "storage", plan.storage
    yield from (("note", note) for note in plan.notes)


def _value(value: object) -> str:
    """As a recipe has it."""
    from lora2serve.sweeping.search_space import show_rate

    if isinstance(value, float) and 0 < value < 0.01:
        return show_rate(value)
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _budget(plan: SweepPlan) -> str:
    from lora2serve.sweeping.search_settings import EXPLORED

    front = "; the front begins once"
    if plan.exploring_trials is not None:
        return f"{front} {plan.exploring_trials} are done"
    if plan.seconds is not None:
        return f", for {plan.seconds / 3600:.3g} hours{front} {100 * EXPLORED:.0f} % of that are over"
    return ""


def _trials(count: int) -> str:
    return "1 trial" if count == 1 else f"{count} trials"


def _begun(plan: SweepPlan) -> str:
    """What of it is there already."""
    if plan.done is None:
        return ""
    done = f"{_trials(plan.done)} {'is' if plan.done == 1 else 'are'} done"
    if plan.finished:
        return f": that sweep is finished, {done}; nothing is trained, and its result is given again"
    again = f", {plan.failed} that failed are tried again" if plan.failed else ""
    return f": that sweep goes on, {done}{again}"


def show(result: SweepResult) -> None:
    """The front as a table, why what is recommended is, and what to do next."""
    from lora2serve import console

    report = result.report
    quality = console.upper_first(report.quality.noun)
    columns = ("Configuration", quality, "From the best", "Memory", "Time", "Parameters")
    best = [line.words == report.recommended.words for line in report.finals]
    styles = {number: "bold" for number, chosen in enumerate(best) if chosen}
    console.table(f"The front of {report.name}", columns, _rows(report), styles)
    console.table(
        "", (f"For {report.constraint}: {report.recommended.words}",), [[line] for line in report.recommended.reason]
    )
    console.table("", ("Next",), [
        [report.explored_words], [f"its run: {result.best.path}"], [f"the page: {result.page}"],
        [f"`lora2serve train {result.recommended}`"],
    ])  # fmt: skip


def _rows(report: SweepReport) -> list[list[str]]:
    from lora2serve.console import size

    return [
        [
            line.words, report.quality.shown(line.objectives.loss), line.change.words if line.change else "best",
            size(line.objectives.memory), f"{line.objectives.seconds:.3g} s", f"{line.objectives.parameters:,}",
        ]
        for line in report.finals
    ]  # fmt: skip
