"""``lora2serve init`` and ``lora2serve train``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.cli.common import base_of, fetch, progress
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.artifacts.run import Run
    from lora2serve.config.recipe import ModelRecipe
    from lora2serve.progress import Progress


@click.command(short_help="Write a commented lora2serve.yaml here.")
@click.option("--overwrite", is_flag=True, help="Replace a lora2serve.yaml that is here already.")
def init(overwrite: bool) -> None:
    """Write a commented lora2serve.yaml here."""
    from lora2serve import console
    from lora2serve.config import recipe

    path = Path("lora2serve.yaml")
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: already here", "--overwrite replaces it")
    path.write_text(recipe.template(), encoding="utf-8")
    console.result(str(path))


@click.command(short_help="Fine-tune as a recipe says.")
@click.argument("recipe", required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field: train.lora.rank=32.")
@click.option("--name", help="Name of the run directory (default: the recipe's name).")
@click.option(
    "--resume", is_flag=True, help="Go on from the last checkpoint of the last run, or of the run named here."
)
@click.pass_context
def train(ctx: click.Context, recipe: str | None, overrides: tuple[str, ...], name: str | None, resume: bool) -> None:
    """Fine-tune as RECIPE says: a path, a built-in name such as "demo", or lora2serve.yaml here.

    Makes runs/<name>/ and points runs/latest at it. Prints the run directory.
    """
    from lora2serve import console
    from lora2serve.artifacts import run
    from lora2serve.config import recipe as recipes

    told = progress(ctx)
    if resume:
        _refuse_with_resume(overrides, name)
        here = run.latest() if recipe is None else _begun(recipe)
        if here.record.finished:
            raise UsageError(f"{here.path}: finished at step {here.record.steps}", "train without --resume")
        chosen = recipes.load(here.recipe)
    else:
        chosen = recipes.load(recipes.find(recipe), overrides)
    from lora2serve.data import data_sets
    from lora2serve.hub import pin_data
    from lora2serve.training.finetune import train as fine_tune
    from lora2serve.training.requirements import check_libraries

    check_libraries(chosen.train.quantize)
    sets = data_sets.load(chosen.data, pin_data)  # before a base of many gigabytes is fetched
    if resume and here.record.base.id:
        base, _ = base_of(here.record.base, None, told)  # at the commit it began with, wherever the branch is now
    else:
        base = _fetch_base(chosen.model, told)
    if not resume:
        here = run.create(name or chosen.name)
    with run.kept_once_started(here), _how_to_go_on(here, told):
        fine_tune(chosen, here, sets, base=base, resume=resume, progress=told)
    told.note("next: `lora2serve export --target ollama` (or vllm, gguf, lmstudio, adapter), then `lora2serve parity`")
    console.result(str(here.path))


def _fetch_base(model: ModelRecipe, told: Progress) -> Path:
    if not model.revision:
        return fetch(model.path, told)
    if Path(model.path).exists():
        raise UsageError(
            f"model.revision: {model.revision}, but {model.path} is a directory", "leave it out, or name a Hub id"
        )
    return fetch(f"{model.path}@{model.revision}", told)


@contextmanager
def _how_to_go_on(here: Run, told: Progress) -> Iterator[None]:
    """After Ctrl-C, at whatever stage: the way on, where there is a checkpoint to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if (here.path / "checkpoints").exists():
            told.note(f"{here.path} is kept: `lora2serve train --resume` goes on from its last checkpoint")
        raise


def _begun(name: str) -> Run:
    """A run to go on with, by path or by name under runs/."""
    from lora2serve.artifacts import run

    for path in (Path(name), run.ROOT / name):
        if (path / "recipe.yaml").is_file():
            return run.Run(path)
    raise UsageError(f"--resume {name}: no run", "name a directory under runs/, or none for the last run")


def _refuse_with_resume(overrides: tuple[str, ...], name: str | None) -> None:
    if overrides or name:
        raise UsageError(
            "--resume goes on with the recipe as it was: no --set and no --name", "start a new run instead"
        )
