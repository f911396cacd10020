"""Recipes: YAML to frozen dataclasses, every problem reported at once with its key path.

Defaults and bounds live in the dataclasses below and nowhere else. Paths are relative to the recipe's own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from lora2serve.config import lora_inits
from lora2serve.config.bounds import NotEmpty, Positive, Range, Untaken
from lora2serve.config.data_recipe import DataRecipe, SourceRecipe
from lora2serve.config.method_problems import problems_of_method
from lora2serve.config.model_name import run_name_problem
from lora2serve.config.objectives import Objective, problems_of_objective
from lora2serve.config.other_names import OTHER_NAMES
from lora2serve.config.recipe_keys import recipe_keys
from lora2serve.config.schema import build, read_keys, show
from lora2serve.errors import RecipeError, UsageError, did_you_mean
from lora2serve.progress import Progress

FILE = "lora2serve.yaml"
EVERY_KEY = "see `lora2serve init` for every key"
HELD_OUT_ROWS = "held-out"  # instead of a suite
EXPERTS, INITS_OF_EXPERTS = "experts", ("default", "gaussian")  # of ``train.lora.target_parameters``
PRESETS = ("qv", "attention", "qv-mlp", "all-linear")
NO_FP4 = "expected nf4 or none: fp4 is no longer trained, and nf4 loses less in the same memory"
NO_ORPO = "expected sft, dpo or kto: TRL's ORPO is experimental, and dpo learns from the same rows"
Parallel = Literal["auto", "ddp", "fsdp"]
Quantize = Literal["nf4", "none"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class ModelRecipe:
    """The base: ``path`` is a directory or a Hub id, ``revision`` a commit, tag or branch on the Hub."""

    path: Annotated[str, NotEmpty("a path or a Hub id")]
    revision: str | None = None


@dataclass(frozen=True)
class LoraRecipe:
    """``targets`` is a preset (qv, attention, qv-mlp, all-linear) or a list of module names.

    ``target_parameters``: ``experts``, or a list of those weights of experts that get a LoRA for each expert.
    """

    rank: Annotated[int, Range(1, 1 << 14)] = 16
    alpha: Annotated[float, Positive(1e6)] = 32
    dropout: Annotated[float, Range(0.0, 0.99)] = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    target_parameters: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    init: str = "default"  # or gaussian, orthogonal, olora, pissa, pissa_niter_16: PEFT's init_lora_weights


@dataclass(frozen=True)
class TrainRecipe:
    """How to train. Either ``steps`` or ``epochs``; ``steps`` wins.

    ``options`` are those of another ``method`` than lora: the fields of its configuration in PEFT. ``preference`` are
    those of another ``objective`` than sft: the fields of its configuration in TRL.
    """

    method: str = "lora"  # or another of PEFT's: ``train_methods``
    options: Mapping[str, object] = field(default_factory=dict)
    # dpo: of two answers the better one; kto: good ones and bad ones
    objective: Annotated[Objective, Untaken("orpo", NO_ORPO)] = "sft"
    preference: Mapping[str, object] = field(default_factory=dict)  # such as beta and loss_type
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    parallel: Parallel = "auto"  # of several processes: each with the whole base (ddp), or with a part of it (fsdp)
    quantize: Annotated[Quantize, Untaken("fp4", NO_FP4)] = "nf4"
    double_quant: bool = True
    epochs: Annotated[float, Positive(1e6)] = 1.0
    steps: Annotated[int | None, Range(1, 1 << 40)] = None
    batch_size: Annotated[int, Range(1, 1 << 20)] = 8
    accumulation: Annotated[int, Range(1, 1 << 20)] = 1
    learning_rate: Annotated[float, Positive(1.0)] = 2e-4
    schedule: Schedule = "cosine"
    warmup: Annotated[float, Range(0.0, 1.0)] = 0.03  # share of the steps
    max_grad_norm: Annotated[float, Range(0.0, 1e9)] = 0.3
    weight_decay: Annotated[float, Range(0.0, 1.0)] = 0.0
    gradient_checkpointing: bool | None = None  # default: on where activations would not fit
    seed: Annotated[int, Range(0, (1 << 32) - 1)] = 42  # what numpy takes
    early_stopping: Annotated[int | None, Range(1, 1 << 20)] = None  # evaluations without a better eval loss
    save_best: bool = False
    eval_steps: Annotated[int | None, Range(1, 1 << 40)] = None  # default: at the end of every epoch
    samples: tuple[Annotated[str, NotEmpty("a prompt")], ...] = ()  # answered at each evaluation
    log_interval: Annotated[int, Range(1, 1 << 20)] = 1
    trackers: tuple[str, ...] = ()  # wandb, tensorboard, ...
    from_adapter: Annotated[str | None, NotEmpty("a run, an adapter or a Hub id")] = None  # whose training goes on


@dataclass(frozen=True)
class ParityRecipe:
    """``thresholds``: format -> {figure: bound}, over the built-in table; ``general`` is a set of general text."""

    general: str | None = None
    engines: tuple[str, ...] = ()  # the only ones to ask; default: every one that an export is for
    require: tuple[str, ...] = ()  # engines that must be there
    allow: tuple[str, ...] = ()  # settings that differ on purpose: FILE:KEY, FILE or KEY, with * and ?
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: Annotated[int, Range(1, 1 << 30)] = 2048  # scored, half of them held-out rows, half general text
    window: Annotated[int, Range(8, 1 << 20)] = 512  # tokens of one row at most
    long: Annotated[int, Range(0, 1 << 20)] = 2048  # tokens of the text near the model's length, at most; 0: none
    prompts: Annotated[int, Range(1, 1 << 20)] = 8  # greedy answers
    new_tokens: Annotated[int, Range(1, 1 << 20)] = 32  # of one answer
    limit: Annotated[float, Positive(1e9)] = 600  # seconds without a response after which an engine is given up


@dataclass(frozen=True)
class EvaluateRecipe:
    """What the trained model is scored on beside its base, once it is trained: suites, and ``held-out`` for the run's
    own held-out rows.
    """

    suites: tuple[str, ...] = ()
    limit: Annotated[int | None, Range(1, 1 << 30)] = None  # only so many items of each


@dataclass(frozen=True)
class Recipe:
    """One fine-tune, from data to proof."""

    model: ModelRecipe
    data: DataRecipe
    name: str = "run"
    train: TrainRecipe = field(default_factory=TrainRecipe)
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    parity: ParityRecipe = field(default_factory=ParityRecipe)


Section = TypeVar("Section", ModelRecipe, DataRecipe, EvaluateRecipe, ParityRecipe)  # those that name paths


def find(name: str | None) -> Path:
    """The file of a recipe: a path, a built-in name, or lora2serve.yaml here."""
    if name is None:
        if not Path(FILE).is_file():
            raise UsageError(f"no {FILE} here", "`lora2serve init` writes one; `lora2serve train demo` runs the demo")
        return Path(FILE)
    if Path(name).is_file():
        return Path(name)
    known = built_in()
    if name in known:
        return known[name]
    if Path(name).is_dir():
        inside = Path(name) / FILE
        hint = f"`lora2serve train {inside}`" if inside.is_file() else f"built in: {', '.join(known)}"
        raise UsageError(f"recipe {name!r}: a directory, expected a YAML file or a built-in recipe", hint)
    raise UsageError(
        f"recipe {name!r}: no such file or built-in recipe{did_you_mean(name, known)}", f"built in: {', '.join(known)}"
    )


def built_in() -> dict[str, Path]:
    """The recipes that come with lora2serve, by name."""
    return {path.stem: path for path in sorted(_builtin().glob("*.yaml"))}


def load(path: Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> Recipe:
    """Read a recipe; RecipeError names every problem in it. ``progress`` hears what an override leaves out."""
    keys = recipe_keys(path, overrides, EVERY_KEY)
    problems = keys.problems
    recipe = build(Recipe, keys.content, problems, OTHER_NAMES)
    problems_of(recipe, problems)
    _raise(path, problems, [override.partition("=")[0].strip() for override in overrides])
    home = path.resolve().parent
    if progress:
        for text in keys.left_out:
            progress.note(text)
    model, data, parity = _absolute(recipe.model, home), _absolute(recipe.data, home), _absolute(recipe.parity, home)
    train = replace(recipe.train, from_adapter=_beside(home, recipe.train.from_adapter))
    evaluate = _absolute(recipe.evaluate, home)
    return replace(recipe, model=model, data=data, train=train, evaluate=evaluate, parity=parity)


def named_keys(path: Path, overrides: Sequence[str] = ()) -> frozenset[str]:
    """The paths of what the file and the overrides say themselves: all else is a default."""
    return recipe_keys(path, overrides, EVERY_KEY).named()


def load_section(path: Path, kind: type[Section]) -> Section:
    """One section of a run's recipe, whatever an earlier release wrote into the others."""
    content, problems = read_keys(path, EVERY_KEY)
    key = {ModelRecipe: "model", DataRecipe: "data", EvaluateRecipe: "evaluate", ParityRecipe: "parity"}[kind]
    problems = []
    section = build(kind, content.get(key), problems, path=key)
    _raise(path, problems)
    return _absolute(section, path.resolve().parent)


def _raise(path: Path, problems: Sequence[str], overridden: Sequence[str] = ()) -> None:
    """Every problem, with the file that it stands in, or --set where it comes from there."""

    def source(problem: str) -> str:
        if problem.startswith("--set "):
            return ""
        key = f"{problem.split(':', 1)[0]}."
        from_options = any(key.startswith(f"{name}.") or f"{name}.".startswith(key) for name in overridden)
        return "--set " if from_options else f"{path.name}: "

    if problems:
        raise RecipeError("\n".join(f"{source(problem)}{problem}" for problem in problems), EVERY_KEY)


def template() -> str:
    """The commented recipe that `lora2serve init` writes."""
    return (Path(__file__).parent / "init.yaml").read_text(encoding="utf-8")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, fully resolved; ``load`` reads it back."""
    import yaml

    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True)


def problems_of(recipe: Recipe, problems: list[str]) -> None:
    """Add what no type and no bound of a single field can rule out."""
    if problem := run_name_problem(recipe.name):
        problems.append(f"name: {problem}")
    problems += _problems_of_lora(recipe.train)
    problems += [
        f"train.parallel: fsdp: {reason}" for reason in unshardable(recipe.train) if recipe.train.parallel == "fsdp"
    ]
    problems += problems_of_method(recipe)
    if not any(problem.startswith("train.objective:") for problem in problems):  # else sft was taken in its place
        problems += problems_of_objective(recipe)
    problems += _problems_of_data(recipe)


def _problems_of_lora(train: TrainRecipe) -> list[str]:
    lora, problems = train.lora, []
    named = {"train.lora.targets": lora.targets, "train.options.target_modules": train.options.get("target_modules")}
    for key, targets in named.items():
        if isinstance(targets, str) and targets not in PRESETS:
            problems.append(
                f"{key}: unknown preset {show(targets)}{did_you_mean(targets, PRESETS)}; "
                f"presets: {', '.join(PRESETS)}, or a list of module names"
            )
    if lora.targets == ():
        problems.append("train.lora.targets: an empty list, expected a preset or module names")
    problems += _problems_of_experts(lora)
    if not lora_inits.is_trainable(lora.init):
        expected = f"{', '.join(lora_inits.TRAINABLE)}{did_you_mean(lora.init, lora_inits.TRAINABLE)}"
        problems.append(f"train.lora.init: {show(lora.init)}, expected one of {expected}")
    elif lora.init not in lora_inits.WITHOUT_BASE and train.quantize != "none":
        problems.append(f"train.lora.init: {lora.init} needs the weights of the base in full: set train.quantize: none")
    if lora.init == "orthogonal" and lora.rank % 2:
        problems.append(f"train.lora.rank: {lora.rank}, expected an even number with train.lora.init: orthogonal")
    return problems


def unshardable(train: TrainRecipe) -> Iterator[str]:
    """What needs the whole base in each process."""
    for name, value, expected in (
        ("method", train.method, "lora"), ("objective", train.objective, "sft"), ("lora.dora", train.lora.dora, False),
        ("lora.modules_to_save", train.lora.modules_to_save, ()),
    ):  # fmt: skip
        if value != expected:
            yield f"train.{name}: {show(value)}, which trains with the whole base in each process (ddp)"
    if train.lora.init not in INITS_OF_EXPERTS:
        yield f"train.lora.init: {train.lora.init}, which needs the whole base in each process (ddp)"


def _problems_of_experts(lora: LoraRecipe) -> Iterator[str]:
    """A LoRA on the weights of experts is a product beside them, and nothing else."""
    wanted, key = lora.target_parameters, "train.lora.target_parameters"
    if isinstance(wanted, str) and wanted != EXPERTS:
        yield f"{key}: {show(wanted)}, expected {EXPERTS} or a list of names{did_you_mean(wanted, [EXPERTS])}"
    if not wanted:
        return
    for name, value in (("dropout", lora.dropout), ("dora", lora.dora)):
        if value:
            yield f"train.lora.{name}: {show(value)}, which no LoRA on experts has: leave it or {key} out"
    if lora.init not in INITS_OF_EXPERTS:
        yield f"train.lora.init: {lora.init}, expected one of {', '.join(INITS_OF_EXPERTS)} with {key}"


def _problems_of_data(recipe: Recipe) -> list[str]:
    data, problems = recipe.data, recipe.data.problems()
    if data.eval is None and not data.eval_split:
        wanted = {"early_stopping": recipe.train.early_stopping, "save_best": recipe.train.save_best}
        problems += [f"train.{key}: needs eval data (data.eval or data.eval_split)" for key, on in wanted.items() if on]
        if HELD_OUT_ROWS in recipe.evaluate.suites:
            problems.append(f"evaluate.suites: {HELD_OUT_ROWS} needs eval data (data.eval or data.eval_split)")
    return problems


PATHS: Mapping[type[object], Sequence[str]] = {
    ModelRecipe: ("path",),
    DataRecipe: ("train", "eval", "chat_template"),
    EvaluateRecipe: ("suites",),
    ParityRecipe: ("general",),
}


def _absolute(section: Section, home: Path) -> Section:
    """Relative paths that exist beside the recipe become absolute; what is left may be a Hub id."""
    return replace(section, **{name: _beside(home, getattr(section, name)) for name in PATHS[type(section)]})


def _beside(home: Path, path: Any) -> Any:
    """One path, or those of several data sets."""
    if isinstance(path, tuple):
        return tuple(_beside(home, item) for item in path)
    if isinstance(path, SourceRecipe):
        return replace(path, path=_beside(home, path.path))
    return str(home / path) if path and (home / path).exists() else path


def _plain(value: object) -> object:
    """Without tuples and read-only mappings, which YAML does not know."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _builtin() -> Path:
    """The shipped recipes: inside the wheel, or beside the package in a checkout."""
    packed = Path(__file__).parents[1] / "_recipes"
    return packed if packed.is_dir() else Path(__file__).parents[2] / "recipes"
