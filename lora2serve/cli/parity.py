"""``lora2serve parity``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from lora2serve.cli.options import (
    Choice,
    Command,
    complete_engines,
    complete_exports,
    dry_run_option,
    engine_cell,
    json_option,
    names,
    plain,
    progress,
)
from lora2serve.errors import ParityNotMet, UsageError

if TYPE_CHECKING:
    from lora2serve.api.check_parity import ParityResult
    from lora2serve.artifacts.parity_overview import OverviewRow
    from lora2serve.artifacts.parity_report import ParityReport
    from lora2serve.parity_check.parity_plan import ParityPlan, PlannedComparison

EXAMPLES = [
    ("lora2serve parity", "all exports of runs/latest"),
    ("lora2serve parity runs/demo/exports/ollama-Q4_K_M", "one export"),
    ('lora2serve parity --ask "Who governs Wexley?"', "and let all of them answer this"),
    ("lora2serve parity --require vllm,llama.cpp", "fail where an engine is missing"),
    ("lora2serve parity --baseline report.json", "fail where something got worse"),
    ("lora2serve parity --url http://localhost:8000/v1", "a deployment that runs"),
    ("lora2serve parity --gate settings", "all but weights and answers, in seconds, no engine"),
    ("lora2serve parity --dry-run", "what would be compared, asked and held to bounds"),
]
HEADS = {
    "export": "export", "size": "size", "engine": "engine", "status": "verdict", "mean_kl": "mean KL",
    "top1": "top\ntoken", "equal_answers": "same\nanswers", "retention": "signal\nkept", "speed": "tokens\n/s",
}  # fmt: skip
file_type = click.Path(path_type=Path, exists=True, dir_okay=False)


def _bounds(ctx: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, float]:
    bounds = {}
    for text in texts:
        path, _, bound = text.partition("=")
        try:
            bounds[path] = float(bound)
        except ValueError:
            raise UsageError(
                f"--threshold {text}: expected FORMAT.FIGURE=NUMBER", "such as Q4_K_M.mean_kl=0.1"
            ) from None
    return bounds


@click.command(cls=Command, short_help="Compare exports with the trained model, in their engines.", examples=EXAMPLES)
@click.argument("paths", metavar="[MODEL] [EXPORT]...", nargs=-1, shell_complete=complete_exports)
@click.option(
    "--report", "report_dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where the report goes (default: the run's parity/, or parity/ next to the exports).",
)  # fmt: skip
@json_option
@click.option("--ask", metavar="PROMPT", default="", help="A question that base, trained model and exports answer.")
@click.option("--base", metavar="MODEL", help="The base: a path or a Hub id (default: the one trained on).")
@click.option("--data", type=file_type, metavar="FILE", help="Held-out rows to score (default: the run's).")
@click.option(
    "--engine", "engines", metavar="ENGINE,ENGINE", callback=names, shell_complete=complete_engines,
    help="Use only these; vllm-server starts the export's own server.",
)  # fmt: skip
@click.option(
    "--require", metavar="ENGINE,ENGINE", callback=names, shell_complete=complete_engines,
    help="Engines that must be installed: parity fails where one is missing.",
)  # fmt: skip
@click.option("--url", metavar="URL", help="Also compare a running deployment: its OpenAI-compatible address.")
@click.option("--url-model", metavar="NAME", help="The model's name at --url (default: the first it lists).")
@click.option(
    "--threshold", "thresholds", multiple=True, metavar="FORMAT.FIGURE=BOUND", callback=_bounds,
    help="Another bound, such as Q4_K_M.mean_kl=0.1, or all.top1=0.9.",
)  # fmt: skip
@click.option(
    "--baseline", type=file_type, metavar="REPORT",
    help="An earlier report.json: parity fails where something got worse beyond noise.",
)  # fmt: skip
@click.option("--gate", type=Choice(["settings"]), help="Compare all that lies beside the weights, and ask no engine.")
@click.option(
    "--allow", multiple=True, metavar="SETTING",
    help="A setting that differs on purpose: FILE:KEY, FILE or KEY, such as generation_config.json:temperature.",
)  # fmt: skip
@dry_run_option(
    help="Only show what would be compared, and every refusal; starts no engine. Exit code 3 if parity cannot be met."
)
@click.pass_context
def parity(
    ctx: click.Context, /, paths: tuple[str, ...], report_dir: Path | None, as_json: bool, ask: str, base: str | None,
    data: Path | None, engines: tuple[str, ...], require: tuple[str, ...], url: str | None, url_model: str | None,
    thresholds: dict[str, float], baseline: Path | None, gate: Literal["settings"] | None, allow: tuple[str, ...],
    dry_run: bool,
) -> None:  # fmt: skip
    """Compare every EXPORT of MODEL with the trained model, each in its real engine.

    MODEL is a run, an adapter directory, a plain model, or a Hub id of one of these; without one, it is what the
    first EXPORT was made from. Without EXPORTs, all of MODEL's; without both, all of runs/latest.
    Exit code 3 when one differs by more than its format allows, or no engine is installed. Prints the report's path.
    """
    from lora2serve.api.check_parity import plan_parity, run_parity
    from lora2serve.api.parity_request import ParityRequest

    request = ParityRequest(
        model=paths[0] if paths else None,
        exports=paths[1:],
        base=base,
        data=data,
        engines=engines,
        require=require,
        thresholds=thresholds,
        url=url,
        url_model=url_model,
        ask=ask,
        baseline=baseline,
        gate=gate,
        allow=allow,
        report_dir=report_dir,
    )
    if dry_run:
        _show_plan(plan_parity(request, progress(ctx)), as_json)
    else:
        _finish(run_parity(request, progress(ctx)), as_json=as_json, quiet=ctx.find_root().obj["quiet"])


def _finish(result: ParityResult, *, as_json: bool, quiet: bool) -> None:
    """Print what came out; ParityNotMet with each row that failed."""
    from lora2serve import console

    if not quiet:
        show(result)
    if as_json:
        console.result_json(result.report.to_json())
    else:
        console.result(str(result.page))
    if not result.met:
        raise ParityNotMet(_summary(result.report), f"{result.page} shows where")


def show(result: ParityResult) -> None:
    """The tables, and at the end what to ship."""
    from lora2serve import console
    from lora2serve.artifacts.parity_overview import columns, overview

    heads = {key: head for key, head in HEADS.items() if key in columns(result.report)}
    lines = overview(result.report)
    rows = [[_cell(line, key) for key in heads] for line in lines]
    styles = {number: "red" for number, line in enumerate(lines) if line.result.red}
    console.table("", [*heads.values()], rows, styles)
    _show_settings(result.report)
    if result.answers:
        console.table("", [result.report.question.prompt, "answer"], [list(pair) for pair in result.answers.items()])
    for item in result.report.recommendations:
        name = f"{item.export} ({console.size(item.size)}), " if item.export else ""
        console.Terminal().note("\n  ".join([f"{item.title}: {name}{item.reason}.", *item.details]))


def _show_plan(plan: ParityPlan, as_json: bool) -> None:
    """The comparisons, the bounds of each format, and what would be asked; ParityNotMet where that is known now."""
    from lora2serve import console

    if as_json:
        console.result_json(plain(plan))
    else:
        _show_comparisons(plan)
    if problems := [f"parity will not be met: {reason}" for reason in plan.unmet]:
        if not as_json:
            console.result("\n".join(problems))
        raise ParityNotMet("\n".join(problems))


def _show_comparisons(plan: ParityPlan) -> None:
    from lora2serve import console
    from lora2serve.artifacts.parity_overview import REFERENCES

    rows = [
        [item.export, item.kind, item.engine.name, engine_cell(item.engine), "yes" if item.required else "no",
         REFERENCES[item.reference]]
        for item in plan.comparisons if item.engine and item.reference
    ]  # fmt: skip
    if rows:
        console.result_table(["export", "format", "engine", "installed", "required", "judged by"], rows)
        _show_bounds(plan.comparisons)
    else:
        console.result_table(["export", "format", "gate"], [[e.export, e.kind, *e.gates] for e in plan.comparisons])
    for line in _asked(plan):
        console.result(line)
    console.result(f"report: {plan.page}")


def _show_bounds(comparisons: Sequence[PlannedComparison]) -> None:
    """A column for each format."""
    from lora2serve import console
    from lora2serve.artifacts.metric_table import bound, label
    from lora2serve.artifacts.parity_overview import unjudged

    formats = {item.kind: item for item in comparisons}
    names = dict.fromkeys(name for item in comparisons for name in item.bounds)
    rows = [
        [label(name), *(unjudged(item.unjudged.get(name, "")) or bound(name, item.bounds.get(name))
                        for item in formats.values())]
        for name in names
    ]  # fmt: skip
    console.result_table(["figure", *formats], rows)


def _asked(plan: ParityPlan) -> Iterator[str]:
    """What every engine would be asked."""
    if plan.trained_in:
        installed = "; ".join(engine_cell(plan.trained_in).splitlines())
        yield f"trained model: {plan.model}, in {plan.trained_in.name} (installed: {installed})"
    if plan.prompts:
        asked, amount = plan.prompts, plan.prompts.amount
        rows = (
            f"half from {asked.rows:,} held-out rows ({asked.source}), half" if asked.rows else "no held-out rows, all"
        )
        yield f"scored: {amount.tokens:,} tokens, {rows} from general text; {amount.window:,} at most in one text"
        if amount.long:
            yield f"long text: {amount.long:,} tokens at most"
        yield f"prompts: {asked.conversations} at most, {amount.prompts} answered with {amount.new_tokens} tokens each"
    if plan.ask:
        yield f"question: {plan.ask}"
    if plan.baseline:
        yield f"baseline: {plan.baseline}"


def _cell(line: OverviewRow, key: str) -> str:
    row = line.result
    if key == "status":
        return row.status if row.gate is None else f"{row.status}: {row.gate.cause or row.gate.first}"
    text = line.cells[key].text.replace("100.00%", "100%")
    return text if key != "speed" or row.speed else "-"


def _show_settings(report: ParityReport) -> None:
    """Every setting that is not the planned one, once for each export."""
    from lora2serve import console

    different = {(row.export, setting.path): setting for row in report.rows for setting in row.settings}
    rows = [
        [export, path, setting.planned, setting.actual, "yes" if setting.allowed else "no"]
        for (export, path), setting in different.items()
    ]
    styles = {number: "red" for number, setting in enumerate(different.values()) if not setting.allowed}
    if rows:
        console.table("", ["export", "setting", "planned", "there", "allowed"], rows, styles)
    for line in dict.fromkeys(
        f"{row.export}: not compared: {line}" for row in report.rows for line in row.not_compared
    ):
        console.Terminal().note(line)


def _summary(report: ParityReport) -> str:
    red = [row for row in report.rows if row.red]
    if red:
        lines = [f"parity not met: {len(red)} of {len(report.rows)} rows failed"]
    elif report.regressions:
        lines = ["parity got worse"]
    else:
        lines = ["nothing was compared: no engine of these exports is installed"]
    for row in red or ([] if report.regressions else report.rows):
        gate = row.gate
        assert gate is not None
        lines.append(f"{row.title}: {gate.name}: {gate.cause or gate.status}; first: {gate.first}")
    return "\n".join([*lines, *report.regressions])
