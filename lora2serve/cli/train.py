"""``lora2serve init`` and ``lora2serve train``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import Command, complete_runs, dry_run_option, json_option, progress
from lora2serve.cli.plan import plan_json, plan_lines
from lora2serve.errors import TrainError, UsageError
from lora2serve.system import launcher

if TYPE_CHECKING:
    from lora2serve.artifacts.run import Run

NEXT = "next: `lora2serve export --target ollama` (or vllm, gguf, lmstudio, adapter), then `lora2serve parity`"
NEXT_ALONE = "next: `lora2serve chat`, or `lora2serve serve --engine peft`: no target can hold this kind of adapter"


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
        ("lora2serve train medical.yaml legal.yaml --jobs 2", "several, each on a GPU of its own"),
        ("lora2serve train medical.yaml legal.yaml --share-base", "several on one base, in one process"),
        ("lora2serve train medical.yaml legal.yaml --on ray", "each on a GPU of a Ray cluster"),
        ("lora2serve train --gpus all", "one run by all GPUs of this machine"),
    ],
)
@click.argument("recipe_files", metavar="[RECIPE]...", nargs=-1, shell_complete=complete_runs)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field: train.lora.rank=32.")
@click.option("--name", help="Name of the run directory (default: the recipe's name).")
@click.option("--gpu", metavar="NAME|GIB", help="Refuse what does not fit into this GPU, instead of this machine's.")
@click.option(
    "--gpus", metavar="N|all", help="Train one run by so many GPUs of this machine (several machines: torchrun)."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Of several recipes, trainings at a time (default: one for each GPU, or one).",
)
@click.option(
    "--share-base",
    is_flag=True,
    help="Train several recipes at the same time in one process, on one base; each does a step in turn.",
)
@click.option(
    "--on", metavar="ray[://HOST:PORT]", help="Train on a Ray cluster (RAY_ADDRESS, or here); --gpus N for each recipe."
)
@dry_run_option(help="Show the plan of `lora2serve plan`; fetch no weights, train nothing.")
@click.option("--resume", is_flag=True, help="Continue the last run, or the run named here, from its last checkpoint.")
@json_option
@click.pass_context
def train(
    ctx: click.Context, recipe_files: tuple[str, ...], overrides: tuple[str, ...], name: str | None, gpu: str | None,
    gpus: str | None, jobs: int | None, share_base: bool, on: str | None, dry_run: bool, resume: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Fine-tune as RECIPE says: a path, a built-in name such as "demo", or lora2serve.yaml here.

    Makes runs/<name>/ and, once it is finished, points runs/latest at it. Prints the run directory. Several recipes are
    trained one beside the other; one that fails leaves the others, and is named in the end.
    """
    from lora2serve.config import recipe as recipes

    _refuse_mixtures(
        len(recipe_files), name=name, gpus=gpus, jobs=jobs, share_base=share_base, on=on, dry_run=dry_run, resume=resume
    )
    if (len(recipe_files) > 1 or on) and not dry_run:
        files = recipe_files or (recipes.FILE,)
        together = int(gpus) if gpus else None
        _train_many(ctx, files, jobs, share_base, on, together, resume, overrides, gpu, as_json)
        return
    if dry_run:
        _show_plans(ctx, recipe_files, share_base, overrides, gpu, as_json)
        return
    from lora2serve import console
    from lora2serve.api import train_run

    first = launcher.is_first()
    recipe = recipe_files[0] if recipe_files else None
    run = train_run.train(
        recipe, overrides=overrides, name=name, resume=resume, gpu=gpu, gpus=gpus, progress=progress(ctx)
    )
    if not first:
        return
    if not gpus:  # whose processes have said it
        progress(ctx).note(_next(run))
    if as_json:
        tuned = run.record.metrics.tuned
        loss = {"eval_loss": tuned.eval_loss} if tuned else {}
        console.result_line({"recipe": recipe or recipes.FILE, "state": "finished", "run": str(run.path), **loss})
    else:
        console.result(str(run.path))


def _show_plans(
    ctx: click.Context, files: tuple[str, ...], share_base: bool, overrides: tuple[str, ...], gpu: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """The plan of each, once what would be refused of any of them is: recipes, models, rows of files."""
    from lora2serve import console
    from lora2serve.api.plan_training import plan
    from lora2serve.config import recipe as recipes
    from lora2serve.data.data_sets import refuse_bad_files

    if files[1:]:
        from lora2serve.sweeping.many_runs import load_all
        from lora2serve.sweeping.shared_trainings import refuse_differences

        loaded = load_all(files, overrides)
        if share_base:
            refuse_differences([(name, recipe) for name, _, recipe in loaded])
            progress(ctx).note("each plan is of one alone: together they have the weights, and activations, once")
        chosen = [(file, recipe) for _, file, recipe in loaded]
    else:
        file = recipes.find(files[0] if files else None)
        chosen = [(file, recipes.load(file, overrides))]
    for _, recipe in chosen:
        refuse_bad_files(recipe.data, recipe.train.objective)
    plans = [plan(file, gpu=gpu, overrides=overrides, progress=progress(ctx)) for file, _ in chosen]
    if as_json:
        console.result_json([training for planned in plans for training in plan_json(planned)])
        return
    for planned in plans:
        for line in plan_lines(planned):
            console.result(line)


def _next(run: Run) -> str:
    """What can be done with what was trained."""
    from lora2serve.adapters.adapter import read_config
    from lora2serve.adapters.kind_targets import serving_targets

    return NEXT if serving_targets(str(read_config(run.adapter)["peft_type"])).keys() - {"no"} else NEXT_ALONE


def _refuse_mixtures(
    count: int, *, name: str | None, gpus: str | None, jobs: int | None, share_base: bool, on: str | None,
    dry_run: bool, resume: bool,
) -> None:  # fmt: skip
    """UsageError with all options that do not go together."""
    together = share_base or on
    of_one = {"--name": name, "--gpus": gpus and not on} if count > 1 else {}
    problems = [f"{option}: of one training, and {count} recipes are named" for option in of_one if of_one[option]]
    if resume and count > 1 and not together:
        problems.append(
            f"--resume: of one training, or with --share-base or --on ray, and {count} are named: a run that goes on "
            "has its own recipe"
        )
    if count > 1 and launcher.launch():
        problems.append(f"{count} recipes: a launcher's processes train one together")
    if jobs and count < 2:
        problems.append(f"--jobs {jobs}: of several recipes, and {count or 'none'} is named")
    if on:
        problems += _not_on_ray(on, name, gpus, count or not resume)
    if share_base and count < 2:
        problems.append(f"--share-base: of several recipes, and {count or 'none'} is named")
    if share_base and jobs:
        problems.append(f"--share-base and --jobs {jobs}: trainings on one base are all in one process")
    if dry_run and resume:
        problems.append("--dry-run and --resume: a run that goes on needs no plan")
    if dry_run and gpus:
        problems.append("--dry-run and --gpus: a plan is that of one GPU")
    if problems:
        raise UsageError("\n".join(problems), "leave one of them out")


def _not_on_ray(on: str, name: str | None, gpus: str | None, is_named: bool | int) -> Iterator[str]:
    """What does not go together with ``--on``."""
    if launcher.launch():
        yield f"--on {on}: a launcher has started this process already"
    if name:
        yield f"--on {on} and --name: each run has its recipe's name"
    if gpus and not (gpus.isdecimal() and int(gpus)):
        yield f"--gpus {gpus}: on Ray, expected a number"
    if not is_named:
        yield f"--on {on} and --resume: name the run"


def _train_many(
    ctx: click.Context, recipe_files: tuple[str, ...], jobs: int | None, share_base: bool, on: str | None,
    gpus: int | None, resume: bool, overrides: tuple[str, ...], gpu: str | None, as_json: bool,
) -> None:  # fmt: skip
    """A table of all of them; TrainError names those that failed."""
    from lora2serve import console
    from lora2serve.sweeping.many_runs import train_many
    from lora2serve.sweeping.run_outcome import RunOutcome

    def show(outcome: RunOutcome) -> None:
        if as_json:
            console.result_line({key: value for key, value in asdict(outcome).items() if value not in ("", None)})

    outcomes = train_many(
        recipe_files, jobs=jobs, share_base=share_base, on=on, gpus=gpus, resume=resume, overrides=overrides,
        gpu=gpu, progress=progress(ctx), finished=show,
    )  # fmt: skip
    rows = [
        (each.recipe, each.run or each.state, "" if each.eval_loss is None else f"{each.eval_loss:.4f}",
         f"{each.seconds:.0f} s")
        for each in outcomes
    ]  # fmt: skip
    console.table("", ("Recipe", "Run", "Eval loss", "Time"), rows)
    failed = [each for each in outcomes if each.state == "failed"]
    if not as_json:
        for each in outcomes:
            if each.run:
                console.result(each.run)
    if failed:
        lines = [f"{len(failed)} of {len(outcomes)} trainings failed", *(f"{e.recipe}: {e.problem}" for e in failed)]
        raise TrainError("\n".join(lines), "; ".join(dict.fromkeys(each.hint for each in failed if each.hint)))
