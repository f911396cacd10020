"""``lora2serve.train``: one fine-tune, from a recipe to a run directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.locate import base_of_run, fetch, locate
from lora2serve.api.run_evaluation import evaluate_run, read_suites
from lora2serve.api.run_processes import as_one_of, on_gpus, run_folder, same_run
from lora2serve.artifacts import run as runs
from lora2serve.config import recipe as recipes
from lora2serve.config.arguments import checked
from lora2serve.config.method_problems import problems_of_method
from lora2serve.config.model_name import refuse_run_name
from lora2serve.config.recipe import ModelRecipe, ParityRecipe, Recipe
from lora2serve.config.schema import show
from lora2serve.console import default_progress
from lora2serve.errors import RecipeError, UsageError, raise_all
from lora2serve.progress import Progress
from lora2serve.system import launcher
from lora2serve.system.library_log import errors_only
from lora2serve.training import ranks

if TYPE_CHECKING:
    from lora2serve.training.shared_base import SharedTraining


@checked
def init(
    path: str | Path = recipes.FILE, *,
    source: str | Path | None = None, overwrite: bool = False, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Write a commented recipe to ``path``, which is returned; UsageError where there is one already.

    source: a config of Axolotl or LLaMA-Factory, which is translated, or a built-in recipe, which is copied. Each key
        of the config that has no place in a recipe is a warning, and stands in the first lines of the file.
    """
    path, progress = Path(path), progress or default_progress()
    text, warnings = (recipes.template(), []) if source is None else _recipe_of(str(source))
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: already exists", "--overwrite replaces it")
    for warning in warnings:
        progress.warn(warning)
    path.write_text(text, encoding="utf-8")
    return path


def _recipe_of(source: str) -> tuple[str, Sequence[str]]:
    """The text of a recipe, and what it does not hold of the config that it is translated from."""
    from lora2serve.config.translation.translated_recipe import translate

    file = recipes.find(source)
    if file == recipes.built_in().get(source):
        return _with_paths(file), []
    translated = translate(file)
    return translated.text, [f"without {item.line()}" for item in translated.left_out]


def _with_paths(recipe: Path) -> str:
    """A built-in recipe, with what lies beside it by its whole path."""

    def whole(line: re.Match[str]) -> str:
        beside = recipe.parent / line[2]
        return f"{line[1]}{beside}" if beside.exists() else line[0]

    return re.sub(r"(?m)^(\s*\w+: )(\S+/\S+)$", whole, recipe.read_text(encoding="utf-8"))


@checked
def train(
    recipe: str | Path | None = None, *,
    overrides: Mapping[str, object] | Sequence[str] = (), name: str | None = None, resume: bool = False,
    gpu: str | None = None, gpus: int | str | None = None, progress: Progress | None = None,
) -> runs.Run:  # fmt: skip
    """Fine-tune as ``recipe`` says, and return the run: ``runs/NAME``, to which ``runs/latest`` then points.

    recipe: the path of a YAML file, a built-in name such as "demo", or nothing for ``lora2serve.yaml`` here.
        With ``resume``, the directory or name of the run to resume; nothing for the last one.
    overrides: fields of the recipe, such as ``{"train.lora.rank": 32}``, or ``["train.lora.rank=32"]``.
    name: name of the run directory; the recipe's by default.
    resume: continue the last checkpoint of a run that was interrupted, with its own recipe.
    gpu: a GPU's name or GiB: the training must fit into that, instead of what this machine has.
    gpus: how many GPUs of this machine train it together, or "all": one process each, which speak on stderr.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises RecipeError with every problem of the recipe, DataError and TrainError for what cannot be trained, HubError
    for what cannot be fetched, and KeyboardInterrupt once Ctrl-C has saved a checkpoint.

    Under a launcher (torchrun and others that set RANK and WORLD_SIZE) it is one of several processes, which all call
    this and all get the run; only the first one writes and speaks. EndedTogether where another one failed.
    """
    progress = progress or default_progress()
    launched = launcher.launch()
    if gpus is not None:
        if launched:
            raise UsageError("--gpus: a launcher has started this process already", "leave it out")
        return on_gpus(gpus, recipe, settings(overrides), name, resume, gpu, progress)
    if not launched:
        return train_here(recipe, settings(overrides), name, resume, gpu, progress)
    with as_one_of(launched, progress) as own_progress:
        return train_here(recipe, settings(overrides), name, resume, gpu, own_progress)


def train_here(
    recipe: str | Path | None, overrides: Sequence[str], name: str | None, resume: bool, gpu: str | None,
    progress: Progress, shared: SharedTraining | None = None,
) -> runs.Run:  # fmt: skip
    """By this process, or by all that were started with it; ``shared``: beside others on one base."""
    if resume and (overrides or name):
        raise UsageError("--resume keeps the recipe as it was: no --set and no --name", "start a new run instead")
    if name is not None:
        refuse_run_name(name, "--name")
    run = same_run(lambda: unfinished(recipe)) if resume else None
    file = run.recipe if run else recipes.find(str(recipe) if recipe else None)
    chosen = recipes.load(file, overrides, progress)
    if not run:
        _check_parity(chosen.parity)
        chosen = with_adapter(chosen, recipes.named_keys(file, overrides), progress)
    progress.note(f"training {run.name if run else name or chosen.name}: loading the libraries")
    suites = read_suites(chosen.evaluate)
    trained = _train(chosen, name or chosen.name, run, gpu, progress, shared)
    if ranks.rank() == 0:
        evaluate_run(trained, suites, chosen.evaluate.limit, progress)
    return trained


def with_adapter(recipe: Recipe, named: Collection[str], progress: Progress) -> Recipe:
    """With the settings of the adapter that the training is to go on from, if it is to.

    named: paths of the recipe's own values; TrainError where one is not that of the adapter.
    """
    if not recipe.train.from_adapter:
        return recipe
    from lora2serve.training.starting_adapter import settings_in_words, starting_from

    source = locate(recipe.train.from_adapter, progress)
    path = source.run.adapter if source.run else source.path
    recipe = replace(recipe, train=starting_from(recipe.train, path.resolve(), named, recipe.data.new_tokens))
    raise_all(problems_of_method(recipe), lambda text: RecipeError(text, recipes.EVERY_KEY))
    progress.note(f"goes on from {source.name}: {settings_in_words(recipe.train)}")
    return recipe


def _train(
    recipe: Recipe, name: str, resumed: runs.Run | None, gpu: str | None, progress: Progress,
    shared: SharedTraining | None,
) -> runs.Run:  # fmt: skip
    from lora2serve.api.memory_check import refuse_too_large
    from lora2serve.data import data_sets
    from lora2serve.hub import pin_data

    with errors_only("bitsandbytes"):  # which names a package that would compute faster on some CPUs
        from lora2serve.training.finetune import train as fine_tune
    from lora2serve.training.loop_choice import share
    from lora2serve.training.requirements import check_libraries, translated

    check_libraries(recipe.train.quantize)
    own_share = replace(recipe, train=share(recipe.train))
    with ranks.first_on_machine():
        # Before a base of many gigabytes is fetched.
        sets = data_sets.load(recipe.data, pin_data, recipe.train.objective)
        if resumed and resumed.record.base.id:
            base, _ = base_of_run(resumed.record.base, None, progress)  # its first commit, wherever the branch is now
        else:
            with translated():  # it loads the first of the libraries
                refuse_too_large(own_share, gpu, progress)
            base = fetch_base(recipe.model, progress)
    with run_folder(name, resumed, progress) as run:
        if shared:
            shared.begun(run.own.path)
        fine_tune(recipe, run.own, sets, base=base, resume=resumed is not None, progress=progress, shared=shared)
    return run.shared


def _check_parity(parity: ParityRecipe) -> None:
    """RecipeError with what no parity could use, which would only be met after the training."""
    from lora2serve.parity_check.comparisons import check_names
    from lora2serve.parity_check.thresholds import lookup

    problems = []
    checks: list[Callable[[], object]] = [
        *(partial(check_names, "engines", [name]) for name in parity.engines),
        *(partial(check_names, "require", [name]) for name in parity.require),
        *(partial(lookup, "bfloat16", {kind: {figure: bound}})
          for kind, bounds in parity.thresholds.items() for figure, bound in bounds.items()),
    ]  # fmt: skip
    hints = []
    for check in checks:
        try:
            check()
        except UsageError as error:
            problems.append(error.message)
            hints.append(error.hint)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)), "; ".join(dict.fromkeys(hints)))


def settings(overrides: Mapping[str, object] | Sequence[str]) -> Sequence[str]:
    """As ``KEY=VALUE`` with the value in YAML, of which JSON is a part; UsageError for a value that is not of YAML."""
    if not isinstance(overrides, Mapping):
        return overrides
    texts, problems = [], []
    for key, value in overrides.items():
        try:
            texts.append(f"{key}={json.dumps(value, default=_of_json)}")
        except (TypeError, ValueError, RecursionError):  # also of a list that holds itself
            problems.append(
                f"overrides[{key!r}]: {show(value)}, expected a value of YAML: a text, a number, a list, ..."
            )
    raise_all(problems, UsageError)
    return texts


def _of_json(value: object) -> object:
    """What JSON has no form of and Python programs hand in all the same."""
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError


def fetch_base(model: ModelRecipe, progress: Progress, *, weights: bool = True) -> Path:
    """The directory of the base; without ``weights`` those are not fetched from the Hub."""
    if not model.revision:
        return fetch(model.path, progress, weights=weights)
    if Path(model.path).exists():
        raise UsageError(
            f"model.revision: {model.revision}, but {model.path} is a directory", "leave it out, or name a Hub id"
        )
    return fetch(f"{model.path}@{model.revision}", progress, weights=weights)


def unfinished(name: str | Path | None) -> runs.Run:
    """The run to resume: the last one, or by its path or its name under ``runs/``."""
    if name is None:
        run = runs.newest() or runs.latest()
        if not run.recipe.is_file():
            raise runs.cut_off(run.path)
    else:
        paths = (Path(name), runs.ROOT / name)
        directory = next((path for path in paths if (path / "recipe.yaml").is_file()), None)
        if directory is None:
            for path in paths:
                runs.refuse_cut_off(path)
            raise UsageError(f"--resume {name}: not a run", "name a directory under runs/, or none for the last run")
        run = runs.Run(directory)
    if run.record.finished:
        raise UsageError(f"{run.path}: finished at step {run.record.steps}", "train without --resume")
    return run
