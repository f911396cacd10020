"""Arguments of the Python API against their annotations: what no type checker has seen is refused by name.

A text is true and a 0 is nothing to code that only asks ``if``; elsewhere Python's own words come from deep inside.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache, wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType, UnionType
from typing import Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin

from lora2serve.config.schema import show
from lora2serve.errors import UsageError, did_you_mean, of_system, raise_all

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")
ONE: Mapping[object, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    Path: "a path",
}
SEVERAL: Mapping[object, str] = {str: "texts", int: "whole numbers", float: "numbers", Path: "paths"}


class _Refused(Exception):
    """What is shown of one value that does not fit."""

    def __init__(self, where: str, value: object, expected: str) -> None:
        super().__init__(f"{where}: {show(value)}, expected {expected}")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises UsageError for arguments of other types than it is annotated with, all at once, and
    Lora2ServeError for what the system refuses.

    Numbers of NumPy are taken for numbers, any iterable but a text for a list, any ``os.PathLike`` for a path; the
    function gets an int or float, a tuple, a Path. What only a type checker knows (``TYPE_CHECKING``) may be anything.
    """
    parameters = signature(function).parameters
    positional = [name for name, one in parameters.items() if one.kind is not Parameter.KEYWORD_ONLY]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        named = dict(zip(positional, args, strict=False))
        taken = take(hints_of(function), {**named, **kwargs})
        values = (*(taken[name] for name in named), *args[len(named) :])  # too many, or twice: Python says so
        try:
            return function(*values, **{name: taken[name] for name in kwargs})  # type: ignore[arg-type]
        except BrokenPipeError:  # of a caller whose own reader is gone
            raise
        except OSError as error:
            raise of_system(error) from error

    return call


def take(hints: Mapping[str, object], values: Mapping[str, object]) -> dict[str, object]:
    """The values by name, as the hints say; UsageError with a line for each that does not fit."""
    taken, problems = {}, []
    for name, value in values.items():
        try:
            taken[name] = _take(hints.get(name, object), value, name)
        except _Refused as refused:
            problems.append(str(refused))
    raise_all(problems, UsageError)
    return taken


def take_fields(record: object) -> None:
    """The same of a frozen dataclass that is being made: each of its fields becomes what its annotation says."""
    kind: Callable[..., object] = type(record)
    given = {each.name: getattr(record, each.name) for each in fields(record)}  # type: ignore[arg-type]
    for name, value in take(hints_of(kind), given).items():
        object.__setattr__(record, name, value)


def checked_methods(kind: type[C]) -> type[C]:
    """The class, with every public method ``checked``, and how it is made."""
    for name, method in list(vars(kind).items()):
        if isinstance(method, classmethod):
            setattr(kind, name, classmethod(checked(method.__func__)))
        elif isinstance(method, FunctionType) and (name == "__init__" or not name.startswith("_")):
            setattr(kind, name, checked(method))
    return kind


@cache
def hints_of(owner: Callable[..., object]) -> Mapping[str, object]:
    """Name -> type, of a function's parameters or a class's fields; ``object`` for what is unknown when it runs."""
    hints: dict[str, object] = {}
    for each in reversed(getattr(owner, "__mro__", (owner,))):  # a class has the fields of those above it, too
        known = vars(sys.modules[each.__module__])
        hints |= {name: _evaluated(text, known) for name, text in getattr(each, "__annotations__", {}).items()}
    hints.pop("return", None)
    return hints


def _evaluated(text: object, known: dict[str, object]) -> object:
    if not isinstance(text, str):  # of a module whose annotations are no texts
        return text
    try:
        return eval(text, known)  # as typing.get_type_hints does, which gives up all of them for one name
    except NameError:
        return object


def _take(kind: object, value: object, where: str) -> object:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(args, value, where)
    if origin is Literal:
        if isinstance(value, tuple(map(type, args))) and value in args:  # an array is equal to each of them in parts
            return value
        raise _Refused(where, value, _name(kind) + (did_you_mean(value, args) if isinstance(value, str) else ""))
    if _is_a(origin, Mapping) and isinstance(value, Mapping):
        return {_take(args[0], key, where): _take(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if (
        _is_a(origin, Sequence)
        and isinstance(value, str | os.PathLike)
        and not {str, Path}.isdisjoint(_members(args[0]))
    ):
        return (_take(args[0], value, where),)  # one is a list of one
    if _is_a(origin, Sequence) and _is_list(value):
        try:
            items = tuple(cast("Iterable[object]", value))
        except TypeError:  # an array without axes
            raise _Refused(where, value, _name(kind)) from None
        if origin is tuple and ... not in args and len(items) != len(args):
            raise _Refused(where, value, f"{len(args)} values")
        return tuple(_take(args[0], item, f"{where}[{number}]") for number, item in enumerate(items))
    if origin is None and isinstance(kind, type):
        return _plain(kind, value, where)
    if origin is Callable and callable(value):
        return value
    raise _Refused(where, value, _name(kind))


def _plain(kind: type, value: object, where: str) -> object:
    is_protocol = getattr(kind, "_is_protocol", False)
    if is_protocol and not getattr(kind, "_is_runtime_protocol", False):
        return value
    if kind is Path and isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str):
        return Path(value)
    if kind in (int, float) and isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool):
        if not _is_finite(value):
            raise _Refused(where, value, f"{_name(kind)} in the range of a float")
        return value if isinstance(value, int | float) else cast("Callable[[object], object]", kind)(value)
    if (
        kind is bool
        and type(value).__module__ == "numpy"
        and str(getattr(value, "dtype", "")) == "bool"
        and value in (0, 1)
    ):
        return bool(value)
    if kind in (int, float) or not isinstance(value, kind) or (is_protocol and isinstance(value, type)):
        raise _Refused(where, value, _name(kind))
    return value


def _one_of(kinds: Sequence[object], value: object, where: str) -> object:
    if Path in kinds and isinstance(value, str) and not _may_be_path(value):
        raise _Refused(where, value, "a text that may be a path")
    problems = {}
    for kind in kinds:
        try:
            return _take(kind, value, where)
        except _Refused as refused:
            problems[kind] = refused
        if _is_a(get_origin(kind), Sequence) and _is_list(value):
            raise problems[kind]  # a list is meant, and something in it is wrong
    offered = [kind for kind in kinds if kind is not type(None)]
    raise problems[offered[0]] if len(offered) == 1 else _Refused(where, value, " or ".join(map(_name, offered)))


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _may_be_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _members(kind: object) -> tuple[object, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_a(origin: object, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _name(kind: object) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if _is_a(get_origin(kind), Mapping):
        return "a dict"
    if _is_a(get_origin(kind), Sequence):
        item = get_args(kind)[0]
        known = [SEVERAL.get(one, "values") for one in _members(item)]
        return f"a list of {' or '.join(known)}"
    if get_origin(kind) is Callable:
        return "a function"
    return ONE.get(kind) or str(getattr(kind, "__name__", kind))
