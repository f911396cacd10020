"""The keys of a recipe as its file and --set name them, before a recipe is built of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.config.schema import read_keys
from lora2serve.config.train_methods import LORA

METHOD = "train.method="


@dataclass(frozen=True)
class RecipeKeys:
    """``content`` is what YAML gives; ``left_out`` says what of the file a --set made no part of the recipe."""

    content: dict[str, object]
    problems: list[str]
    left_out: tuple[str, ...] = ()

    def named(self) -> frozenset[str]:
        """The paths of all values: ``train.lora.rank``."""
        return frozenset(_paths(self.content))


def recipe_keys(path: Path, overrides: Sequence[str], hint: str) -> RecipeKeys:
    """Those of the file with each ``KEY=VALUE`` put in; RecipeError, with the hint, for what is no YAML."""
    content, problems = read_keys(path, hint)
    left_out = _leave_out(path.name, content, overrides)
    for override in overrides:
        _override(content, override, problems)
    return RecipeKeys(content, problems, left_out)


def _leave_out(file: str, content: dict[str, object], overrides: Sequence[str]) -> tuple[str, ...]:
    """What the file says of its own kind of adapter, where --set names another kind."""
    train = content.get("train")
    chosen = [text.removeprefix(METHOD).strip(" \"'") for text in overrides if text.startswith(METHOD)]
    if not chosen or not isinstance(train, dict):
        return ()
    method, of_file = chosen[-1], train.get("method") or LORA
    sections = [] if method == of_file else ["options"] if method == LORA else ["lora", "options"]
    dropped = [name for name in sections if train.pop(name, None)]
    return tuple(f"train.{name} of {file} is left out: train.method is {method}" for name in dropped)


def _override(content: dict[str, object], override: str, problems: list[str]) -> None:
    """``train.lora.rank=32``, the value in YAML, goes in before the recipe is built."""
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"--set {override}: expected KEY=VALUE")
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        value = text
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        inner = section[parent]
        if not isinstance(inner, dict):
            problems.append(f"--set {override}: {parent} holds no keys")
            return
        section = inner
    section[last] = value


def _paths(content: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}"
