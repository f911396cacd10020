"""``lora2serve evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import (
    Choice,
    Command,
    complete_exports,
    dry_run_option,
    engine_cell,
    json_option,
    names,
    plain,
    progress,
)
from lora2serve.errors import GateNotMet

if TYPE_CHECKING:
    from lora2serve.api.evaluate_model import EvaluationResult
    from lora2serve.evaluation.eval_report import EvalReport
    from lora2serve.evaluation.evaluation_plan import EvaluationPlan

EXAMPLES = [
    ("lora2serve evaluate", "runs/latest on its held-out rows"),
    ("lora2serve evaluate --against base", "and whether the training helped"),
    ("lora2serve evaluate runs/demo/exports/gguf-Q4_K_M --against runs/demo", "what an export lost"),
    ("lora2serve evaluate --suite medqa.yaml --gate 'medqa.acc >= 0.7'", "a suite of your own; exit code 3"),
    ("lora2serve evaluate medical-qa@champion medical-qa@8 --suite medqa.yaml", "two versions side by side"),
    ("lora2serve evaluate --task arc_easy,medmcqa --against base", "tasks of lm-evaluation-harness"),
    ("lora2serve evaluate http://localhost:8000 --suite medqa.yaml", "a server that runs"),
    ("lora2serve evaluate --gate 'acc >= base - 0.01' --against base --dry-run", "are there enough items for it?"),
]
ANSWERING = ("peft", "transformers", "vllm-server", "llama.cpp")


@click.command(cls=Command, short_help="Score models on a suite, in the engines that serve them.", examples=EXAMPLES)
@click.argument(
    "models", metavar="[RUN | EXPORT | ADAPTER | NAME@ALIAS | URL]...", nargs=-1, shell_complete=complete_exports
)
@click.option(
    "--against", metavar="MODEL", shell_complete=complete_exports,
    help="Compare with it, item by item: base (the first model without its adapter), or any other model.",
)  # fmt: skip
@click.option(
    "--suite", metavar="FILE", type=click.Path(path_type=Path),
    help="YAML with rows and a scorer, or a file of rows (default: the run's held-out rows).",
)  # fmt: skip
@click.option("--task", "tasks", metavar="NAMES", callback=names, help="Tasks of lm-evaluation-harness: arc_easy,mmlu.")
@click.option(
    "--task-folder", metavar="FOLDER", type=click.Path(path_type=Path), help="More tasks for --task, in YAML."
)
@click.option("--shots", type=click.IntRange(min=0), metavar="N", help="--task: examples before each question.")
@click.option("--chat", is_flag=True, help="--task: write questions by the chat template, as it is served.")
@click.option("--limit", type=int, metavar="N", help="Only the first N items.")
@click.option(
    "--gate", "gates", multiple=True, metavar="GATE",
    help="What must hold: 'acc >= 0.9', 'answers.acc >= base - 0.01'; else exit code 3.",
)  # fmt: skip
@click.option(
    "--engine", type=Choice(ANSWERING), help="Ask exports in this engine (default: the one that serves them)."
)
@click.option("--base", metavar="MODEL", help="Adapters: the base to load (default: the one trained on).")
@click.option("--url-model", metavar="NAME", help="The model's name at the URL (default: the first it lists).")
@click.option("--allow-overlap", is_flag=True, help="Also on questions that were trained on.")
@click.option("--out", metavar="FOLDER", help="Where the scores go (default: the run's evals/, or evals/NAME).")
@json_option
@dry_run_option(help="Only show what would be asked, and every refusal; starts no engine.")
@click.pass_context
def evaluate(
    ctx: click.Context, models: tuple[str, ...], against: str | None, suite: Path | None, tasks: tuple[str, ...],
    task_folder: Path | None, shots: int | None, chat: bool, limit: int | None, gates: tuple[str, ...],
    engine: str | None, base: str | None, url_model: str | None, allow_overlap: bool, out: str | None, as_json: bool,
    dry_run: bool,
) -> None:  # fmt: skip
    """Put a suite to models (default: runs/latest), score their answers, and say whether they differ.

    Runs and adapters are asked in transformers and PEFT, vllm exports in vLLM's own server, gguf, ollama and lmstudio
    exports in llama.cpp, with the chat template as it is served. Differences are judged item by item; where there are
    not enough items, that is the verdict. Prints the path of the report.
    """
    from lora2serve.api.evaluate_model import plan_evaluation, run_evaluation
    from lora2serve.api.evaluation_request import EvaluationRequest

    request = EvaluationRequest(
        model=models or None, against=against, suite=suite, limit=limit, gate=gates, task=tasks,
        task_folder=task_folder, shots=shots, chat=chat, engine=engine or "", base=base, url_model=url_model,
        allow_overlap=allow_overlap, out=out,
    )  # fmt: skip
    if dry_run:
        show_plan(plan_evaluation(request, progress(ctx)), as_json=as_json)
    else:
        finish(run_evaluation(request, progress(ctx)), as_json=as_json)


def finish(result: EvaluationResult, *, as_json: bool) -> None:
    """Print what came out; GateNotMet with each gate that is not."""
    from lora2serve import console

    report = result.report
    if as_json:
        console.result_json(report.to_json())
    else:
        show(report)
        console.result(str(result.page))
    missed = [f"{gate.gate}: {gate.subject}: {gate.verdict}: {gate.reason}" for gate in report.gates if not gate.met]
    if missed:
        raise GateNotMet("\n".join(missed), f"{result.page} shows where")


def show_plan(plan: EvaluationPlan, *, as_json: bool) -> None:
    """The models with their engines, the gates, and what would be asked."""
    from lora2serve import console

    if as_json:
        console.result_json(plain(plan))
        return
    rows = [
        [model.name, model.engine.name, engine_cell(model.engine), model.overlap or "none", "\n".join(model.records)]
        for model in plan.models
    ]  # fmt: skip
    heads = ["model", "engine", "installed", "overlap with training rows", "scores"]
    console.result_table(heads, rows)
    if plan.gates:
        gates = [[gate.gate, gate.subject, gate.can_be_met, gate.reason] for gate in plan.gates]
        console.result_table(["gate", "of", "can be met", ""], gates)
    for note in dict.fromkeys([*plan.notes, *(model.note for model in plan.models if model.note)]):
        console.result(note)
    source, scorer = f" of {plan.source}" if plan.source else "", f", scored by {plan.scorer}" if plan.scorer else ""
    console.result(f"{plan.suite}: {plan.items:,} items{source}{scorer}")
    for task, count in plan.tasks.items():
        console.result(f"  {task}: {count:,}")
    console.result(f"report: {plan.page}")


def show(report: EvalReport) -> None:
    """The tables."""
    from lora2serve import console
    from lora2serve.evaluation.report.eval_page import counted, difference_text, label, shown, verdict

    names = list(dict.fromkeys(name for row in report.subjects for name in row.figures))
    heads = ["model", *(label(name) for name in names), "seconds", "engine"]
    rows = [
        [row.name, *(_cell(shown(row.figures[name]), row.figures[name].low, row.figures[name].high)
                     if name in row.figures else "-" for name in names), f"{row.seconds:.3g}", row.engine]
        for row in report.subjects
    ]  # fmt: skip
    console.table("", heads, rows)
    if report.differences:
        lines = [
            [item.subject, label(item.metric), difference_text(item), f"{item.p_adjusted:.2g}",
             f"{item.difference.won} / {item.difference.lost}", item.verdict]
            for item in report.differences
        ]  # fmt: skip
        styles = {number: "red" for number, item in enumerate(report.differences) if item.verdict == "worse"}
        against = report.differences[0].against
        console.table(
            "",
            [f"against {against}", "figure", "difference", "p", " / ".join(counted(report)), "verdict"],
            lines,
            styles,
        )
    for gate in report.gates:
        console.Terminal().note(f"{gate.gate}: {gate.subject}: {gate.verdict}: {gate.reason}")
    console.Terminal().note(verdict(report))


def _cell(value: str, low: float | None, high: float | None) -> str:
    ends = f"\n{100 * low:.1f} to {100 * high:.1f}" if low is not None and high is not None else ""
    return f"{value}{ends}"
