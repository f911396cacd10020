"""``lora2serve init`` and ``lora2serve train``."""

from __future__ import annotations

import click

from lora2serve.cli.options import Command, complete_runs, dry_run_option, progress
from lora2serve.cli.plan import plan_lines
from lora2serve.errors import UsageError
from lora2serve.system import launcher


@click.command(
    cls=Command,
    short_help="Write a commented lora2serve.yaml here.",
    examples=[
        ("lora2serve init", ""),
        ("lora2serve init --from axolotl.yaml", "translate a config of Axolotl or LLaMA-Factory"),
        ("lora2serve init --from qwen3-8b", "begin with a built-in recipe"),
        ("lora2serve init --overwrite", "start again from the template"),
    ],
)
@click.option(
    "--from", "source", metavar="FILE|NAME", help="A config of Axolotl or LLaMA-Factory, or a built-in recipe."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing lora2serve.yaml.")
@click.pass_context
def init(ctx: click.Context, source: str | None, overwrite: bool) -> None:
    """Write a commented lora2serve.yaml into this directory. Prints its path.

    With --from, a config of Axolotl or LLaMA-Factory becomes a recipe that trains the same; each key that has no place
    in one is a warning, and stands in the first lines of the file.
    """
    from lora2serve import console
    from lora2serve.api import train_run

    console.result(str(train_run.init(source=source, overwrite=overwrite, progress=progress(ctx))))


@click.command(
    cls=Command,
    short_help="Fine-tune as a recipe says.",
    examples=[
        ("lora2serve train", "lora2serve.yaml here"),
        ("lora2serve train demo", "a small model, on the CPU, in two minutes"),
        ("lora2serve train --set train.lora.rank=32", "one field for one run"),
        ("lora2serve train --dry-run --gpu 24", "the memory that it takes, and what fits into 24 GiB"),
        ("lora2serve train --resume", "continue the last run"),
        ("lora2serve train --gpus all", "one run by all GPUs of this machine"),
    ],
)
@click.argument("recipe", required=False, shell_complete=complete_runs)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field: train.lora.rank=32.")
@click.option("--name", help="Name of the run directory (default: the recipe's name).")
@click.option("--gpu", metavar="NAME|GIB", help="Refuse what does not fit into this GPU, instead of this machine's.")
@click.option(
    "--gpus", metavar="N|all", help="Train one run by so many GPUs of this machine (several machines: torchrun)."
)
@dry_run_option(help="Show the plan of `lora2serve plan`; fetch no weights, train nothing.")
@click.option("--resume", is_flag=True, help="Continue the last run, or the run named here, from its last checkpoint.")
@click.pass_context
def train(
    ctx: click.Context, recipe: str | None, overrides: tuple[str, ...], name: str | None, gpu: str | None,
    gpus: str | None, dry_run: bool, resume: bool,
) -> None:  # fmt: skip
    """Fine-tune as RECIPE says: a path, a built-in name such as "demo", or lora2serve.yaml here.

    Makes runs/<name>/ and, once it is finished, points runs/latest at it. Prints the run directory.
    """
    from lora2serve import console
    from lora2serve.api import train_run
    from lora2serve.api.plan_training import plan
    from lora2serve.config import recipe as recipes

    if dry_run:
        if resume:
            raise UsageError("--dry-run and --resume: a run that goes on needs no plan", "leave one of them out")
        if gpus:
            raise UsageError("--dry-run and --gpus: a plan is that of one GPU", "leave one of them out")
        for line in plan_lines(plan(recipes.find(recipe), gpu=gpu, overrides=overrides, progress=progress(ctx))):
            console.result(line)
        return
    first = launcher.is_first()
    run = train_run.train(
        recipe, overrides=overrides, name=name, resume=resume, gpu=gpu, gpus=gpus, progress=progress(ctx)
    )
    if first and not gpus:  # whose processes have said it
        progress(ctx).note(
            "next: `lora2serve export --target ollama` (or vllm, gguf, lmstudio, adapter), then `lora2serve parity`"
        )
    if first:
        console.result(str(run.path))
