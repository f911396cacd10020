"""Plain YAML values to frozen dataclasses: every value that does not fit becomes a problem with its key path."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, cast, get_args, get_origin

from lora2serve.config.bounds import Bound, Untaken
from lora2serve.config.yaml_text import compose_yaml, construct
from lora2serve.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from yaml import Node

T = TypeVar("T")
LONGEST_VALUE = 60  # characters of it in a message
TYPE_NAMES: Mapping[object, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, as an escape may write it
UNKNOWN = "?"  # instead of a text that is missing or wrong


def build(
    kind: type[T], content: object, problems: list[str], other_names: Mapping[str, str] | None = None, path: str = ""
) -> T:  # fmt: skip
    """``content`` (what YAML gives) as a ``kind``: a dataclass of scalars, Literals, tuples, Mappings and their unions.

    Where it does not fit, ``problems`` gets a line and the default is taken, so that all other values are checked, too.
    ``other_names`` are what other libraries call a key: name -> key path. ``path`` is where the content stands.
    """
    return cast("T", _Builder(problems, other_names or {}).build(kind, content, path))


def show(value: object) -> str:
    """A value as a message shows it: one line of at most 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of over 4300 digits has no decimal form
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def read_keys(path: Path, hint: str) -> tuple[dict[str, object], list[str]]:
    """The keys of a YAML file, and a problem for each that is there twice.

    Raises RecipeError, with the hint, for what is no YAML or holds no keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = compose_yaml(text)
        content, problems = construct(document), repeated_keys(document)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise RecipeError(f"{path}: {error}", hint) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: {show(content)}, expected keys and values", hint)
    return content, problems


def repeated_keys(node: Node | None, path: str = "", seen: set[int] | None = None) -> list[str]:
    """A problem for each key that a YAML document (``yaml.compose``) has twice: YAML itself silently keeps the last."""
    import yaml

    seen = set() if seen is None else seen
    if node is None or id(node) in seen:
        return []
    seen.add(id(node))
    problems, keys = [], set()
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            problems += repeated_keys(item, f"{path}[{number}]", seen)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            here = f"{path}.{key.value}" if path else str(key.value)
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                problems.append(f"{show(here)[1:-1]}: given twice")
            keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
            problems += repeated_keys(item, here, seen)
    return problems


@cache  # most of the time that a recipe takes
def _hints(kind: type[object]) -> Mapping[str, object]:
    return typing.get_type_hints(kind, include_extras=True)


class _Builder:
    """One method for each kind of type; ``problems`` collects what does not fit."""

    def __init__(self, problems: list[str], other_names: Mapping[str, str]) -> None:
        self.problems, self.other_names = problems, other_names

    def build(self, kind: object, value: object, path: str) -> object:
        """``value`` as a ``kind``."""
        if isinstance(kind, type) and is_dataclass(kind):
            return self._dataclass(kind, value, path)
        origin, args = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self._annotated(args[0], args[1:], value, path)
        if origin in (typing.Union, types.UnionType):
            return self._union(args, value, path)
        if origin is Literal:
            return self._choice(args, value, path)
        if origin is tuple:
            return self._tuple(args[0], value, path)
        if origin is not None:  # Mapping[str, X]
            return self._mapping(args[1], value, path)
        return self._scalar(kind, value, path)

    def _dataclass(self, kind: type[object], value: object, path: str) -> object:
        value = {} if value is None else value  # a section whose every line is a comment
        if not isinstance(value, dict):
            self.problems.append(f"{path}: {show(value)}, expected keys and values")
            return _Builder([], {}).build(kind, {}, path)
        own = cast("typing.Any", kind)
        hints, known = _hints(own), {spec.name: spec for spec in fields(own)}
        prefix = f"{path}." if path else ""
        self.problems += [
            f"{prefix}{_name(key)}: unknown key{self._meant(key, prefix, known)}" for key in value if key not in known
        ]
        built = {}
        for name, spec in known.items():
            required = spec.default is MISSING and spec.default_factory is MISSING
            nested = is_dataclass(hints[name])
            if name not in value and required and not nested:
                self.problems.append(f"{prefix}{name}: missing")
                built[name] = cast("object", UNKNOWN)
            elif name in value or (required and nested):
                before = len(self.problems)
                item = self.build(hints[name], value.get(name), f"{prefix}{name}")
                if len(self.problems) == before or nested or _holds_dataclasses(hints[name]):
                    built[name] = item
                elif required:
                    built[name] = UNKNOWN
        return kind(**built)

    def _meant(self, key: object, prefix: str, known: Collection[str]) -> str:
        """The key that another library's name is for, or the one that is spelled nearly so, by its whole path."""
        if not isinstance(key, str):
            return ""
        path = self.other_names.get(f"{prefix}{key}") or self.other_names.get(key)
        return f" (did you mean {path!r}?)" if path else did_you_mean(key, known, prefix)

    def _annotated(self, kind: object, notes: Sequence[object], value: object, path: str) -> object:
        for note in notes:
            if isinstance(note, Untaken) and note.choice == value:
                self.problems.append(f"{path}: {show(value)}, {note.reason}")
                return value
        before = len(self.problems)
        built = self.build(kind, value, path)
        if len(self.problems) > before:
            return built
        for reason in (note.problem(built) for note in notes if isinstance(note, Bound)):
            if reason:
                self.problems.append(f"{path}: {'empty' if built in ('', ()) else show(built)}, {reason}")
        return built

    def _choice(self, choices: Sequence[object], value: object, path: str) -> object:
        if value not in choices:
            known = [str(choice) for choice in choices]
            near = did_you_mean(str(value), known) if isinstance(value, str) else ""
            self.problems.append(f"{path}: {show(value)}, expected one of {', '.join(known)}{near}")
        return value

    def _union(self, kinds: Sequence[object], value: object, path: str) -> object:
        if value is None and type(None) in kinds:
            return None
        tried: dict[object, list[str]] = {}
        for kind in (kind for kind in kinds if kind is not type(None)):
            tried[kind] = []
            built = _Builder(tried[kind], self.other_names).build(kind, value, path)
            if not tried[kind]:
                return built
        fitting = [kind for kind in tried if _shape(kind) is type(value)]
        if len(tried) == 1 or fitting:
            self.problems += tried[fitting[0] if fitting else next(iter(tried))]
        else:
            expected = " or ".join(_type_name(kind) for kind in tried)
            self.problems.append(f"{path}: {show(value)}, expected {expected}")
        return value

    def _tuple(self, kind: object, value: object, path: str) -> object:
        values = value if isinstance(value, list) else [value] if isinstance(value, str) else None
        if values is None:
            self.problems.append(f"{path}: {show(value)}, expected a list")
            return ()
        return tuple(self.build(kind, item, f"{path}[{number}]") for number, item in enumerate(values))

    def _mapping(self, kind: object, value: object, path: str) -> object:
        if not isinstance(value, dict):
            self.problems.append(f"{path}: {show(value)}, expected keys and values")
            return {}
        self.problems += [f"{path}: key {show(key)}, expected text" for key in value if not isinstance(key, str)]
        texts = {key: item for key, item in value.items() if isinstance(key, str)}
        return {key: self.build(kind, item, f"{path}.{_name(key)}") for key, item in texts.items()}

    def _scalar(self, kind: object, value: object, path: str) -> object:
        if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                value = float(value)  # YAML 1.1 reads 2e-4 as a string
        if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            if isinstance(value, float) and not math.isfinite(value):
                self.problems.append(f"{path}: {show(value)}, expected a finite number")
            if isinstance(value, str) and SURROGATE.search(value):
                self.problems.append(f"{path}: {show(value)}, which has half of a surrogate pair: no text")
            return value
        quotes = ", so put it in quotes" if kind is str and isinstance(value, bool | int | float) else ""
        self.problems.append(f"{path}: {show(value)}, expected {TYPE_NAMES[kind]}{quotes}")
        return value


def _shape(kind: object) -> object:
    """The type of what YAML gives for a ``kind``."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return list if get_origin(kind) is tuple else dict if is_dataclass(kind) or get_origin(kind) is Mapping else kind


def _holds_dataclasses(kind: object) -> bool:
    """Whether it is a list or a mapping of sections: those that fit are checked on, beside one that does not."""
    lists = get_origin(kind) in (tuple, get_origin(Mapping[str, object]))
    return lists and any(isinstance(each, type) and is_dataclass(each) for each in get_args(kind))


def _type_name(kind: object) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(show, get_args(kind)))
    shape = _shape(kind)
    return "a list" if shape is list else "keys and values" if shape is dict else TYPE_NAMES[shape]


def _name(key: object) -> str:
    """A key as a message shows it, which is one line."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= LONGEST_VALUE else show(key)
