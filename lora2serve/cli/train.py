"""``lora2serve init`` and ``lora2serve train``."""

from __future__ import annotations

from pathlib import Path

import click

from lora2serve.cli.common import fetch, progress
from lora2serve.errors import UsageError


@click.command()
@click.option("--overwrite", is_flag=True, help="Replace a lora2serve.yaml that is here already.")
def init(overwrite: bool) -> None:
    """Write a commented lora2serve.yaml here."""
    from lora2serve import console, recipe

    path = Path("lora2serve.yaml")
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: already here", "--overwrite replaces it")
    path.write_text(recipe.template(), encoding="utf-8")
    console.result(str(path))


@click.command()
@click.argument("recipe", required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field: train.lora.rank=32.")
@click.option("--name", help="Name of the run directory (default: the recipe's name).")
@click.option("--resume", is_flag=True, help="Go on with the last run from its last checkpoint.")
@click.pass_context
def train(ctx: click.Context, recipe: str | None, overrides: tuple[str, ...], name: str | None, resume: bool) -> None:
    """Fine-tune as RECIPE says: a path, a built-in name such as "demo", or lora2serve.yaml here.

    Makes runs/<name>/ and points runs/latest at it. Prints the run directory.
    """
    from lora2serve import console, run
    from lora2serve import recipe as recipes

    told = progress(ctx)
    if resume:
        _refuse_with_resume(overrides, name)
        here = run.latest() if recipe is None else run.Run(run.ROOT / recipe)
        chosen = recipes.load(here.recipe)
    else:
        chosen = recipes.load(recipes.find(recipe), overrides)
    from lora2serve.train.trainer import train as fine_tune

    base = fetch(f"{chosen.model.path}@{chosen.model.revision}" if chosen.model.revision else chosen.model.path, told)
    if not resume:
        here = run.create(name or chosen.name)
    with run.kept_once_started(here):
        fine_tune(chosen, here, base=base, resume=resume, progress=told)
    console.result(str(here.path))


def _refuse_with_resume(overrides: tuple[str, ...], name: str | None) -> None:
    if overrides or name:
        raise UsageError(
            "--resume goes on with the recipe as it was: no --set and no --name", "start a new run instead"
        )
