"""Plain YAML values to frozen dataclasses: every value that does not fit becomes a problem with its key path."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from lora2serve.errors import did_you_mean

SHOWN = 60  # characters of a value in a message
WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
UNKNOWN = "?"  # stands in for a text that is missing or wrong


def build(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """``value`` as a ``kind``: a dataclass, scalar, Literal, tuple, Mapping or a union of these.

    Where it does not fit, ``problems`` gets a line and the default stands in, so that all other values are looked at.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, path, problems)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(args, value, path, problems)
    if origin is Literal:
        if value not in args:
            known = [str(arg) for arg in args]
            near = did_you_mean(str(value), known) if isinstance(value, str) else ""
            problems.append(f"{path}: {shown(value)}, expected one of {', '.join(known)}{near}")
        return value
    if origin is tuple:
        return _build_tuple(args[0], value, path, problems)
    if origin is not None:  # Mapping[str, X]
        return _build_mapping(args[1], value, path, problems)
    return _build_scalar(kind, value, path, problems)


def shown(value: Any) -> str:
    """A value as a message shows it: one line of at most 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of over 4300 digits has no decimal form
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def repeated(node: Any, path: str = "", seen: set[int] | None = None) -> list[str]:
    """Key paths that stand twice in a YAML document (``yaml.compose``): YAML itself silently keeps the last."""
    seen = set() if seen is None else seen
    if node is None or id(node) in seen:
        return []
    seen.add(id(node))
    found, keys = [], set()
    if node.id == "sequence":
        for number, item in enumerate(node.value):
            found += repeated(item, f"{path}[{number}]", seen)
    elif node.id == "mapping":
        for key, item in node.value:
            here = f"{path}.{key.value}" if path else str(key.value)
            if key.id == "scalar" and key.value in keys:
                found.append(f"{shown(here)[1:-1]}: given twice")
            keys |= {key.value} if key.id == "scalar" else set()
            found += repeated(item, here, seen)
    return found


def _build_dataclass(kind: type[Any], value: Any, path: str, problems: list[str]) -> Any:
    value = {} if value is None else value  # a section whose every line is a comment
    if not isinstance(value, dict):
        problems.append(f"{path}: {shown(value)}, expected keys and values")
        return _build_dataclass(kind, {}, path, [])
    hints = typing.get_type_hints(kind)
    known: dict[str, Field[Any]] = {spec.name: spec for spec in fields(kind)}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in known:
            near = did_you_mean(key, known) if isinstance(key, str) else ""
            problems.append(f"{prefix}{_name(key)}: unknown key{near}")
    built = {}
    for name, spec in known.items():
        required = spec.default is MISSING and spec.default_factory is MISSING
        nested = is_dataclass(hints[name])
        if name not in value and required and not nested:
            problems.append(f"{prefix}{name}: missing")
            built[name] = UNKNOWN
        elif name in value or (required and nested):
            before = len(problems)
            made = build(hints[name], value.get(name), f"{prefix}{name}", problems)
            if len(problems) == before or nested:
                built[name] = made
            elif required:
                built[name] = UNKNOWN
    return kind(**built)


def _name(key: Any) -> str:
    """A key as it stands in a message, which is one line."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= SHOWN else shown(key)


def _build_union(kinds: Sequence[Any], value: Any, path: str, problems: list[str]) -> Any:
    if value is None and type(None) in kinds:
        return None
    told: dict[Any, list[str]] = {}
    for kind in (kind for kind in kinds if kind is not type(None)):
        found: list[str] = []
        made = build(kind, value, path, found)
        if not found:
            return made
        told[kind] = found
    fitting = [kind for kind in told if (get_origin(kind) is tuple) == isinstance(value, list)]
    if len(told) == 1 or (isinstance(value, list) and fitting):
        problems += told[fitting[0] if fitting else next(iter(told))]
    else:
        words = " or ".join("a list" if get_origin(kind) is tuple else WORDS[kind.__name__] for kind in told)
        problems.append(f"{path}: {shown(value)}, expected {words}")
    return value


def _build_tuple(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    values = value if isinstance(value, list) else [value] if isinstance(value, str) else None
    if values is None:
        problems.append(f"{path}: {shown(value)}, expected a list")
        return ()
    return tuple(build(kind, item, f"{path}[{n}]", problems) for n, item in enumerate(values))


def _build_mapping(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{path}: {shown(value)}, expected keys and values")
        return {}
    problems += [f"{path}: key {shown(key)}, expected text" for key in value if not isinstance(key, str)]
    return {
        key: build(kind, item, f"{path}.{_name(key)}", problems) for key, item in value.items() if isinstance(key, str)
    }


def _build_scalar(kind: type[Any], value: Any, path: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-4 as a string
        except (ValueError, OverflowError):
            pass
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    quotes = ", so put it in quotes" if kind is str and isinstance(value, bool | int | float) else ""
    problems.append(f"{path}: {shown(value)}, expected {WORDS[kind.__name__]}{quotes}")
    return value
