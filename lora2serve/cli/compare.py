"""``lora2serve compare``."""

from __future__ import annotations

from pathlib import Path

import click

from lora2serve.cli.evaluate import ANSWERING, finish, show_plan
from lora2serve.cli.options import Choice, Command, complete_exports, dry_run_option, json_option, progress

EXAMPLES = [
    ("lora2serve compare runs/demo runs/demo/exports/ollama-Q4_K_M", "what the type changes"),
    ("lora2serve compare medical-qa@champion medical-qa@8 --suite medqa.yaml", "two versions"),
    ("lora2serve compare http://localhost:8000 qa-v8 --url-model qa-v7", "two models of one server"),
    (
        "lora2serve compare runs/a runs/b --suite traffic.jsonl --gate 'changed <= 0.05'",
        "captured requests",
    ),
]


@click.command(cls=Command, short_help="Ask two models the same, and say in what they differ.", examples=EXAMPLES)
@click.argument("first", metavar="MODEL", shell_complete=complete_exports)
@click.argument("second", metavar="MODEL", shell_complete=complete_exports)
@click.option(
    "--suite", metavar="FILE", type=click.Path(path_type=Path),
    help="A suite, or prompts without anything expected (default: the held-out rows of the first's run).",
)  # fmt: skip
@click.option("--limit", type=int, metavar="N", help="Only the first N items.")
@click.option(
    "--gate", "gates", multiple=True, metavar="GATE",
    help="What must hold of the second: 'changed <= 0.05', 'acc >= other - 0.01'; else exit code 3.",
)  # fmt: skip
@click.option("--engine", type=Choice(ANSWERING), help="Ask exports in this engine (default: the one that serves).")
@click.option("--base", metavar="MODEL", help="Adapters: the base to load (default: the one trained on).")
@click.option("--url-model", metavar="NAME", help="The first model's name at the URL (default: the first it lists).")
@click.option("--out", metavar="FOLDER", help="Where the report goes (default: evals/compared in the first's run).")
@json_option
@dry_run_option(help="Only show what would be asked, and every refusal; starts no engine.")
@click.pass_context
def compare(
    ctx: click.Context, first: str, second: str, suite: Path | None, limit: int | None, gates: tuple[str, ...],
    engine: str | None, base: str | None, url_model: str | None, out: str | None, as_json: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Ask two runs, exports, adapters, versions (NAME@ALIAS) or servers the same prompts.

    The first is asked twice: what changes between its answers is the floor. Scores where something is expected; answers
    that changed, KL of the first token, length, refusals, valid JSON, seconds for all. Prints the path of the report.
    """
    from lora2serve.api.compare_models import plan_comparison, run_comparison
    from lora2serve.api.evaluation_request import CompareRequest

    request = CompareRequest(
        first=first, second=second, suite=suite, limit=limit, gate=gates, engine=engine or "", base=base,
        url_model=url_model, out=out,
    )  # fmt: skip
    if dry_run:
        show_plan(plan_comparison(request, progress(ctx)), as_json=as_json)
    else:
        finish(run_comparison(request, progress(ctx)), as_json=as_json)
