"""JSON objects as frozen dataclasses: a bad key is named by its path, all of them at once; unknown keys are kept.

A ``JsonRecord`` reads what any version of a format has written: every field that may be absent has a default, and what
this version does not know goes into ``unknown`` and is written again. Infinity and NaN, which JSON has not, are text.
"""

from __future__ import annotations

import json
import math
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from lora2serve.config.schema import TYPE_NAMES, show
from lora2serve.errors import InputError, raise_all
from lora2serve.system.small_files import refuse_large

OWN = ("unknown", "key_order")  # fields of a record that are no keys of the object
NOT_FINITE = ("inf", "-inf", "nan")
LARGEST = (1 << 63) - 1  # whole number
_FIELDS: dict[type[JsonRecord], Mapping[str, tuple[Field[Any], object]]] = {}


@dataclass(frozen=True)
class JsonRecord:
    """An object of JSON. Two are equal where their values are, in whatever order their keys stand."""

    WHOLE: ClassVar[bool] = False  # whether what is at its default is written, too
    COMPUTED: ClassVar[tuple[str, ...]] = ()  # keys that follow from others: written, and passed over when read

    unknown: Mapping[str, object] = field(default_factory=dict, kw_only=True, repr=False)
    key_order: tuple[str, ...] = field(default=(), kw_only=True, repr=False, compare=False)  # as it was read

    @classmethod
    def from_json(cls, value: object, source: str) -> Self:
        """The record in a parsed JSON object; InputError with every bad key, each behind ``source``."""
        try:
            problems = list(_damaged_text(value, ""))
        except RecursionError:
            raise InputError(f"{source}: nested too deep", "the file is damaged or malicious") from None
        raise_all([f"{source}: {problem}" for problem in problems], InputError)
        record = _decode(cls, value, "", problems)
        raise_all([f"{source}: {problem}" for problem in problems], InputError)
        assert isinstance(record, cls)
        return record

    @classmethod
    def from_text(cls, text: str, source: str) -> Self:
        """As ``from_json``, of a JSON document."""
        repeated: list[str] = []
        try:
            value = json.loads(text, object_pairs_hook=partial(_without_repeated, repeated))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not JSON ({str(error)[:100]})", "the file is damaged") from None
        raise_all([f"{source}: {_joined('', key)}: given twice" for key in repeated], InputError)
        return cls.from_json(value, source)

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys whose values have the right type and still cannot be, each with what is wrong."""
        return iter(())

    def to_json(self) -> dict[str, object]:
        """The object: keys that were read in their order, then the others that are not at their default."""
        values: dict[str, object] = {}
        for spec in fields(self):
            key, value = _key(spec), getattr(self, spec.name)
            whole = self.WHOLE and not self.key_order  # an older file is not given the keys of a newer version
            if spec.name not in OWN and (whole or key in self.key_order or value != _default(spec)):
                values[key] = _encode(value)
        values |= {key: _encode(value) for key, value in self.unknown.items()}
        return {key: values[key] for key in self.key_order if key in values} | values

    def to_text(self, indent: int | None = 2) -> str:
        """As a JSON document; None makes it one line, in half of the time."""
        return json.dumps(self.to_json(), indent=indent, ensure_ascii=False) + "\n"


def read_text(path: Path) -> str:
    """The text of a JSON file; InputError in one line where it cannot be read."""
    try:
        refuse_large(path, InputError)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not JSON (not UTF-8 at byte {error.start})", "the file is damaged") from None


def named(key: str, default: object) -> Any:
    """A field whose key in JSON is no name in Python, such as ``from``."""
    return field(default=default, metadata={"key": key})


def required(factory: Callable[[], object]) -> Any:
    """A field that an object without it is refused for, and that is filled in later where it is made here."""
    return field(default_factory=factory, metadata={"required": True})


def _key(spec: Field[Any]) -> str:
    return str(spec.metadata.get("key", spec.name))


def _default(spec: Field[Any]) -> object:
    if spec.default_factory is not MISSING:
        default: object = spec.default_factory()
        return default
    return spec.default


def _encode(value: object) -> object:
    if isinstance(value, JsonRecord):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _fields_by_key(kind: type[JsonRecord]) -> Mapping[str, tuple[Field[Any], object]]:
    """Key -> its field and the field's type."""
    if kind not in _FIELDS:
        hints = get_type_hints(kind)
        _FIELDS[kind] = {_key(spec): (spec, hints[spec.name]) for spec in fields(kind) if spec.name not in OWN}
    return _FIELDS[kind]


def _decode(kind: object, value: object, path: str, problems: list[str]) -> object:
    """``value`` as a ``kind``; where it does not fit, ``problems`` gets a line."""
    if isinstance(kind, type) and issubclass(kind, JsonRecord):
        return _decode_record(kind, value, path, problems)
    if kind is object:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin is None:
        return _decode_scalar(kind, value, path, problems)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, path, problems)
    if origin is Literal:
        if value not in args:
            problems.append(_misfit(path, value, f"one of {', '.join(map(str, args))}"))
        return value
    if origin is tuple:
        return _decode_tuple(args, value, path, problems)
    if not isinstance(value, dict):  # Mapping[str, X]
        problems.append(_misfit(path, value, "an object"))
        return {}
    return {key: _decode(args[1], item, _joined(path, key), problems) for key, item in value.items()}


def _decode_record(kind: type[JsonRecord], value: object, path: str, problems: list[str]) -> object:
    if not isinstance(value, dict):
        problems.append(_misfit(path, value, "an object"))
        return value
    known, decoded, before = _fields_by_key(kind), dict[str, Any](), len(problems)
    for key, (spec, hint) in known.items():
        if key in value:
            decoded[spec.name] = _decode(hint, value[key], _joined(path, key), problems)
        elif _default(spec) is MISSING or spec.metadata.get("required"):
            problems.append(f"{_joined(path, key)}: missing")
    if len(problems) > before:
        return value
    unknown = {key: item for key, item in value.items() if key not in known and key not in kind.COMPUTED}
    record = kind(**decoded, unknown=unknown, key_order=tuple(value))
    problems += [f"{_joined(path, key)}: {reason}" for key, reason in record.misfits()]
    return record


def _decode_union(kinds: Sequence[object], value: object, path: str, problems: list[str]) -> object:
    if value is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    for kind in rest[:-1]:
        misfits: list[str] = []
        decoded = _decode(kind, value, path, misfits)
        if not misfits:
            return decoded
    return _decode(rest[-1], value, path, problems)


def _decode_tuple(kinds: Sequence[object], value: object, path: str, problems: list[str]) -> object:
    if not isinstance(value, list | tuple):
        problems.append(_misfit(path, value, "a list"))
        return ()
    if kinds[-1] is ...:
        return tuple(_decode(kinds[0], item, f"{path}[{n}]", problems) for n, item in enumerate(value))
    if len(value) != len(kinds):
        problems.append(_misfit(path, value, f"a list of {len(kinds)}"))
        return ()
    pairs = zip(kinds, value, strict=True)
    return tuple(_decode(kind, item, f"{path}[{n}]", problems) for n, (kind, item) in enumerate(pairs))


def _decode_scalar(kind: object, value: object, path: str, problems: list[str]) -> object:
    if kind is float and isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    wanted = (int, float) if kind is float else kind
    assert isinstance(wanted, type | tuple) and isinstance(kind, type)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        problems.append(_misfit(path, value, TYPE_NAMES[kind]))
    elif isinstance(value, int) and abs(value) > (LARGEST if kind is int else sys.float_info.max):
        problems.append(_misfit(path, value, f"{TYPE_NAMES[kind]} of 64 bits"))
    return value


def _without_repeated(repeated: list[str], pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object; ``repeated`` gets the keys that it has twice, of which JSON itself silently keeps the last."""
    repeated += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return dict(pairs)


def _damaged_text(value: object, path: str) -> Iterator[str]:
    """A problem for each text, keys too, that no file and no terminal takes: JSON can write half a character."""
    if isinstance(value, str) and not _is_unicode(value):
        yield _misfit(path, value, "Unicode text")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _damaged_text(item, f"{path}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _is_unicode(key):
                yield _misfit(path, key, "a key of Unicode text")
            yield from _damaged_text(item, _joined(path, key))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _misfit(path: str, value: object, expected: str) -> str:
    what = {None: "null", True: "true", False: "false"}.get(value, "") if isinstance(value, bool | None) else ""
    return f"{path + ': ' if path else ''}{what or show(value)}, expected {expected}"


def _joined(path: str, key: str) -> str:
    name = key if key.isprintable() and len(key) <= 200 else show(key)
    return f"{path}.{name}" if path else name
