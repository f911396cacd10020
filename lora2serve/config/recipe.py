"""Recipes: YAML to frozen dataclasses, every problem reported at once with its key path.

Defaults live in the dataclasses and nowhere else. Paths are relative to the recipe's own file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora2serve.config import lora_inits
from lora2serve.config.schema import build, repeated, shown
from lora2serve.errors import RecipeError, UsageError, did_you_mean

FILE = "lora2serve.yaml"
SHAPE = "see `lora2serve init` for every key"
PRESETS = ("qv", "attention", "qv-mlp", "all-linear")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
Quantize = Literal["nf4", "fp4", "none"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class ModelRecipe:
    """The base: ``path`` is a directory or a Hub id, ``revision`` a commit, tag or branch on the Hub."""

    path: str
    revision: str | None = None


@dataclass(frozen=True)
class DataRecipe:
    """Rows of ``messages``, ``prompt`` + ``completion`` or ``text``: JSONL, Parquet, or a Hub data set."""

    train: str
    eval: str | None = None  # a file or set of its own, or
    eval_split: float | str | None = None  # the share of the training rows to hold out, or a split of the data set
    split: str = "train"  # of a data set with splits
    subset: str | None = None  # of a data set with several
    max_length: int = 1024  # tokens; longer rows are cut
    packing: bool = False
    completion_only: bool = True  # loss on what the assistant says, not on the prompt


@dataclass(frozen=True)
class LoraRecipe:
    """``targets`` is a preset (qv, attention, qv-mlp, all-linear) or a list of module names."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    init: str = "default"  # or gaussian, orthogonal, olora, pissa, pissa_niter_16: PEFT's init_lora_weights


@dataclass(frozen=True)
class TrainRecipe:
    """How to train. Either ``steps`` or ``epochs``; ``steps`` wins."""

    lora: LoraRecipe = field(default_factory=LoraRecipe)
    quantize: Quantize = "nf4"
    double_quant: bool = True
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03  # share of the steps
    max_grad_norm: float = 0.3
    weight_decay: float = 0.0
    gradient_checkpointing: bool | None = None  # default: on with a quantised base
    seed: int = 42
    early_stopping: int | None = None  # evaluations without a better eval loss
    save_best: bool = False
    eval_steps: int | None = None  # default: at the end of every epoch
    log_interval: int = 1
    trackers: tuple[str, ...] = ()  # wandb, tensorboard, ...


@dataclass(frozen=True)
class ParityRecipe:
    """``thresholds``: format -> {figure: bound}, over the built-in table; ``general`` is a set of general text."""

    general: str | None = None
    engines: tuple[str, ...] = ()  # the only ones to ask; default: every one that an export is for
    require: tuple[str, ...] = ()  # engines that must be there
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: int = 2048  # scored, half of them held-out rows, half general text
    window: int = 512  # tokens of one row at most
    prompts: int = 8  # greedy answers
    new_tokens: int = 32  # of one answer
    limit: float = 600  # seconds without a sign of life after which an engine is given up


@dataclass(frozen=True)
class Recipe:
    """One fine-tune, from data to proof."""

    model: ModelRecipe
    data: DataRecipe
    name: str = "run"
    train: TrainRecipe = field(default_factory=TrainRecipe)
    parity: ParityRecipe = field(default_factory=ParityRecipe)


def find(name: str | None) -> Path:
    """The file of a recipe: a path, a built-in name, or lora2serve.yaml here."""
    if name is None:
        if not Path(FILE).is_file():
            raise UsageError(f"no {FILE} here", "`lora2serve init` writes one; `lora2serve train demo` runs the demo")
        return Path(FILE)
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in sorted(_builtin().glob("*.yaml"))}
    if name in known:
        return known[name]
    raise UsageError(
        f"recipe {name!r}: no such file or built-in recipe{did_you_mean(name, known)}", f"built in: {', '.join(known)}"
    )


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; RecipeError names every problem in it."""
    content, problems = _read(path)
    for override in overrides:
        _override(content, override, problems)
    recipe = build(Recipe, content, "", problems)
    _check(recipe, problems)
    if problems:
        raise RecipeError("\n".join(f"{path.name}: {problem}" for problem in problems), SHAPE)
    return _absolute(recipe, path.resolve().parent)


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of a YAML file, and a problem for each that stands twice."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        problems = repeated(yaml.compose(text, yaml.SafeLoader))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # numbers and dates that cannot be
        raise RecipeError(f"{path}: {' '.join(str(error).split())[:300]}", SHAPE) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: {shown(content)}, expected keys and values", SHAPE)
    return content, problems


def template() -> str:
    """The commented recipe that `lora2serve init` writes."""
    return (Path(__file__).parent / "init.yaml").read_text(encoding="utf-8")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, fully resolved; ``load`` reads it back."""
    import yaml

    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True)


def _override(content: dict[str, Any], override: str, problems: list[str]) -> None:
    """``train.lora.rank=32``, the value in YAML, goes in before the recipe is built."""
    import yaml

    key, found, text = override.partition("=")
    if not found or not key:
        problems.append(f"--set {override}: expected KEY=VALUE")
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        value = text
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        if not isinstance(place[parent], dict):
            problems.append(f"--set {override}: {parent} holds no keys")
            return
        place = place[parent]
    place[last] = value


def _check(recipe: Recipe, problems: list[str]) -> None:
    """Values that no type can rule out."""
    for key, (value, low, high) in _bounds(recipe).items():
        if value is not None and not low <= value <= high:
            problems.append(f"{key}: {shown(value)}, expected {low} to {high}")
    train, parity = recipe.train, recipe.parity
    positive = {
        "train.epochs": (train.epochs, 1e6),
        "train.learning_rate": (train.learning_rate, 1.0),
        "train.lora.alpha": (train.lora.alpha, 1e6),
        "parity.limit": (parity.limit, 1e9),
    }
    for key, (value, high) in positive.items():
        if not 0 < value <= high:
            problems.append(f"{key}: {value}, expected more than 0 and at most {high:g}")
    if not re.fullmatch(NAME, recipe.name) or recipe.name == "latest":
        problems.append(f"name: {shown(recipe.name)}, expected letters, digits, '.', '_' and '-', and not 'latest'")
    texts = {"model.path": recipe.model.path, "data.train": recipe.data.train, "data.eval": recipe.data.eval}
    problems += [f"{key}: empty, expected a path or a Hub id" for key, text in texts.items() if text == ""]
    problems += _problems_of_lora(train)
    problems += _problems_of_data(recipe)


def _bounds(recipe: Recipe) -> dict[str, tuple[float | None, float, float]]:
    train, lora, data, parity = recipe.train, recipe.train.lora, recipe.data, recipe.parity
    return {
        "data.max_length": (data.max_length, 8, 1 << 20),
        "data.eval_split": (None if isinstance(data.eval_split, str) else data.eval_split, 0.0, 0.9),
        "train.steps": (train.steps, 1, 1 << 40),
        "train.batch_size": (train.batch_size, 1, 1 << 20),
        "train.accumulation": (train.accumulation, 1, 1 << 20),
        "train.warmup": (train.warmup, 0.0, 1.0),
        "train.max_grad_norm": (train.max_grad_norm, 0.0, 1e9),
        "train.weight_decay": (train.weight_decay, 0.0, 1.0),
        "train.seed": (train.seed, 0, (1 << 32) - 1),  # what numpy takes
        "train.early_stopping": (train.early_stopping, 1, 1 << 20),
        "train.eval_steps": (train.eval_steps, 1, 1 << 40),
        "train.log_interval": (train.log_interval, 1, 1 << 20),
        "train.lora.rank": (lora.rank, 1, 1 << 14),
        "train.lora.dropout": (lora.dropout, 0.0, 0.99),
        "parity.tokens": (parity.tokens, 1, 1 << 30),
        "parity.window": (parity.window, 8, 1 << 20),
        "parity.prompts": (parity.prompts, 1, 1 << 20),
        "parity.new_tokens": (parity.new_tokens, 1, 1 << 20),
    }


def _problems_of_lora(train: TrainRecipe) -> list[str]:
    lora, found = train.lora, []
    if isinstance(lora.targets, str) and lora.targets not in PRESETS:
        found.append(
            f"train.lora.targets: unknown preset {shown(lora.targets)}{did_you_mean(lora.targets, PRESETS)}; "
            f"presets: {', '.join(PRESETS)}, or a list of module names"
        )
    if lora.targets == ():
        found.append("train.lora.targets: an empty list, expected a preset or module names")
    if not lora_inits.is_trainable(lora.init):
        expected = f"{', '.join(lora_inits.TRAINABLE)}{did_you_mean(lora.init, lora_inits.TRAINABLE)}"
        found.append(f"train.lora.init: {shown(lora.init)}, expected one of {expected}")
    elif lora.init not in lora_inits.WITHOUT_BASE and train.quantize != "none":
        found.append(f"train.lora.init: {lora.init} needs the weights of the base in full: set train.quantize: none")
    if lora.init == "orthogonal" and lora.rank % 2:
        found.append(f"train.lora.rank: {lora.rank}, expected an even number with train.lora.init: orthogonal")
    return found


def _problems_of_data(recipe: Recipe) -> list[str]:
    data, found = recipe.data, []
    if data.eval is not None and data.eval_split is not None:
        found.append("data.eval_split: expected either eval or eval_split, not both")
    if data.eval_split == "":
        found.append("data.eval_split: empty, expected a share such as 0.05, or the name of a split")
    if data.eval is None and not data.eval_split:
        asked = {"early_stopping": recipe.train.early_stopping, "save_best": recipe.train.save_best}
        found += [f"train.{key}: needs eval data (data.eval or data.eval_split)" for key, on in asked.items() if on]
    return found


def _absolute(recipe: Recipe, home: Path) -> Recipe:
    """Relative paths that exist beside the recipe become absolute; what is left may be a Hub id."""

    def place(text: str | None) -> str | None:
        return str(home / text) if text and (home / text).exists() else text

    model = replace(recipe.model, path=place(recipe.model.path) or "")
    data = replace(recipe.data, train=place(recipe.data.train) or "", eval=place(recipe.data.eval))
    return replace(recipe, model=model, data=data, parity=replace(recipe.parity, general=place(recipe.parity.general)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _builtin() -> Path:
    """The shipped recipes: inside the wheel, or beside the package in a checkout."""
    packed = Path(__file__).parents[1] / "_recipes"
    return packed if packed.is_dir() else Path(__file__).parents[2] / "recipes"
