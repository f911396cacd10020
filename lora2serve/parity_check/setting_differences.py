"""Two files of settings, value by value: what differs, under the key where it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lora2serve.artifacts.parity_report import SettingDifference
from lora2serve.config.yaml_text import load_yaml
from lora2serve.exporting import settings_plan
from lora2serve.exporting.settings_plan import Header
from lora2serve.system.small_files import MAX_SIZE, without_repeated

ABSENT = "nothing"
MOST_SHOWN = 90  # characters of a value
EXCERPT = 40  # characters of a text from where it differs


def compare_files(name: str, planned: bytes, actual: bytes) -> list[SettingDifference]:
    """What differs in a side file, by its format; nothing where only the way it is written does."""
    if planned == actual:
        return []
    parse = _parser(name)
    if parse is None:
        return [_different_text(name, planned, actual)]
    try:
        expected, found = parse(planned), parse(actual)
    except (ValueError, RecursionError) as error:
        return [SettingDifference(name, "", "a file that can be read", " ".join(str(error).split())[:MOST_SHOWN])]
    return compare_values(name, expected, found)


def compare_stored(
    name: str, planned: bytes, path: Path, comparable: Callable[[str, bytes], bytes] = lambda name, content: content
) -> list[SettingDifference]:
    """The same for a file as it lies there, of which no more is read than a side file may be long.

    ``comparable`` (name, content) takes out of both what makes no difference.
    """
    size = path.stat().st_size
    if size > MAX_SIZE:
        return [SettingDifference(name, "", f"{len(planned)} bytes", f"{size} bytes")]
    return compare_files(name, comparable(name, planned), comparable(name, path.read_bytes()))


def compare_headers(name: str, planned: Header, actual: Header) -> list[SettingDifference]:
    """What differs in the header of a file of weights."""
    pairs = {key: (planned.get(key), actual.get(key)) for key in [*planned, *(k for k in actual if k not in planned)]}
    sides: tuple[dict[str, object], dict[str, object]] = ({}, {})
    for key, pair in pairs.items():
        if pair[0] == pair[1]:
            continue
        same_kind = pair[0] is not None and pair[1] is not None and pair[0].kind == pair[1].kind
        for side, value in zip(sides, pair, strict=True):
            if value is not None:
                side[key] = value.value if same_kind or None in pair else _Typed(f"{shown(value.value)} ({value.kind})")
    return compare_values(name, *sides)


def fits(path: str, patterns: Iterable[str]) -> bool:
    """Whether ``FILE:KEY`` is one of those that the patterns mean; ``*`` stands for any text."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


class _Typed(str):
    """A value with its type, where the types differ."""


def compare_values(name: str, planned: object, actual: object) -> list[SettingDifference]:
    """What differs between two values of the kinds that JSON has."""
    return [SettingDifference(name, key, shown(p), shown(a)) for key, p, a in _walk("", planned, actual)]


def shown(value: object) -> str:
    """A value in one short line."""
    if value is _MISSING:
        return ABSENT
    if isinstance(value, _Typed):
        text = str(value)
    elif isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float):
        text = f"{value:.7g}"
    elif isinstance(value, Mapping | Sequence | bool | None):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 15]} ... ({len(text)} characters)"


class _Missing:
    """Where one side has no value."""


_MISSING = _Missing()


def _walk(path: str, planned: object, actual: object) -> Iterator[tuple[str, object, object]]:
    """(key, planned, actual) of each smallest part that differs."""
    if _equal(planned, actual):
        return
    if isinstance(planned, Mapping) and isinstance(actual, Mapping):
        for key in [*planned, *(key for key in actual if key not in planned)]:
            inside = f"{path}.{key}" if path else str(key)
            yield from _walk(inside, planned.get(key, _MISSING), actual.get(key, _MISSING))
    elif _are_lists(planned, actual) and (len(planned) == len(actual) or len(planned) > 8):  # type: ignore[arg-type]
        assert isinstance(planned, Sequence) and isinstance(actual, Sequence)
        for number in range(max(len(planned), len(actual))):
            pair = [side[number] if number < len(side) else _MISSING for side in (planned, actual)]
            yield from _walk(f"{path}[{number}]", *pair)
    elif isinstance(planned, str) and isinstance(actual, str) and max(len(planned), len(actual)) > MOST_SHOWN:
        yield path, *_excerpts(planned, actual)
    else:
        yield path, planned, actual


def _equal(planned: object, actual: object) -> bool:
    """As JSON has it: true is no 1, and 1.0 is."""
    if isinstance(planned, bool) != isinstance(actual, bool):
        return False
    if isinstance(planned, Mapping | Sequence) and not isinstance(planned, str):
        return (
            False if type(planned) is not type(actual) or len(planned) != len(actual) else _same_parts(planned, actual)
        )
    return planned == actual


def _same_parts(planned: object, actual: object) -> bool:
    if isinstance(planned, Mapping) and isinstance(actual, Mapping):
        return planned.keys() == actual.keys() and all(_equal(value, actual[key]) for key, value in planned.items())
    assert isinstance(planned, Sequence) and isinstance(actual, Sequence)
    return all(_equal(expected, found) for expected, found in zip(planned, actual, strict=True))


def _are_lists(*values: object) -> bool:
    return all(isinstance(value, Sequence) and not isinstance(value, str) for value in values)


def _excerpts(planned: str, actual: str) -> tuple[str, str]:
    """Both texts from where they part, the place in the first."""
    pairs = enumerate(zip(planned, actual, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(planned), len(actual)))
    start = max(0, at - 10)
    return f"...{planned[start : at + EXCERPT]}", f"...{actual[start : at + EXCERPT]}"


def _parser(name: str) -> Callable[[bytes], object] | None:
    """What reads the file's settings; None for one that is compared as it is."""
    base = name.rpartition("/")[2]
    if base == "tokenizer.json":
        return _tokenizer
    if base.endswith(".json") or base == "params":
        return _json
    if base == "serve.yaml":
        return _yaml
    if base == "Modelfile":
        return lambda content: settings_plan.read_modelfile(content.decode())
    return None


def _json(content: bytes) -> object:
    return json.loads(content, object_pairs_hook=without_repeated)


def _tokenizer(content: bytes) -> object:
    """Added tokens by their ids, whatever their order; merges in one of their two forms."""
    value = _json(content)
    added = value.get("added_tokens") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(added, list) and all(isinstance(t, dict) and "id" in t for t in added):
        ids = [token["id"] for token in added]
        if len(set(ids)) == len(ids):
            value["added_tokens"] = {str(token["id"]): token for token in added}
    model = value.get("model") if isinstance(value, dict) else None
    if isinstance(model, dict) and isinstance(merges := model.get("merges"), list):
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return value


def _yaml(content: bytes) -> object:
    return load_yaml(content.decode())


def _different_text(name: str, planned: bytes, actual: bytes) -> SettingDifference:
    try:
        expected, found = planned.decode(), actual.decode()
    except UnicodeDecodeError:
        return SettingDifference(
            name, "", *(f"{len(c)} bytes, sha256 {hashlib.sha256(c).hexdigest()[:12]}" for c in (planned, actual))
        )
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(expected), len(found)))
    ends = [repr(text[at : at + EXCERPT]) if at < len(text) else "its end" for text in (expected, found)]
    return SettingDifference(name, f"character {at}", *ends)
