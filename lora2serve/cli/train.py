"""``lora2serve init`` and ``lora2serve train``."""

from __future__ import annotations

import click

from lora2serve.cli.options import Command, complete_runs, progress


@click.command(
    cls=Command,
    short_help="Write a commented lora2serve.yaml here.",
    examples=[("lora2serve init", ""), ("lora2serve init --overwrite", "start again from the template")],
)
@click.option("--overwrite", is_flag=True, help="Replace an existing lora2serve.yaml.")
def init(overwrite: bool) -> None:
    """Write a commented lora2serve.yaml into this directory. Prints its path."""
    from lora2serve import console
    from lora2serve.api import train_run

    console.result(str(train_run.init(overwrite=overwrite)))


@click.command(
    cls=Command,
    short_help="Fine-tune as a recipe says.",
    examples=[
        ("lora2serve train", "lora2serve.yaml here"),
        ("lora2serve train demo", "a small model, on the CPU, in two minutes"),
        ("lora2serve train --set train.lora.rank=32", "one field for one run"),
        ("lora2serve train --resume", "continue the last run"),
    ],
)
@click.argument("recipe", required=False, shell_complete=complete_runs)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field: train.lora.rank=32.")
@click.option("--name", help="Name of the run directory (default: the recipe's name).")
@click.option("--resume", is_flag=True, help="Continue the last run, or the run named here, from its last checkpoint.")
@click.pass_context
def train(ctx: click.Context, recipe: str | None, overrides: tuple[str, ...], name: str | None, resume: bool) -> None:
    """Fine-tune as RECIPE says: a path, a built-in name such as "demo", or lora2serve.yaml here.

    Makes runs/<name>/ and, once it is finished, points runs/latest at it. Prints the run directory.
    """
    from lora2serve import console
    from lora2serve.api import train_run

    run = train_run.train(recipe, overrides=overrides, name=name, resume=resume, progress=progress(ctx))
    progress(ctx).note(
        "next: `lora2serve export --target ollama` (or vllm, gguf, lmstudio, adapter), then `lora2serve parity`"
    )
    console.result(str(run.path))
