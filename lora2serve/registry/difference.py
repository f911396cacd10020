"""In what two versions differ: one line a field, recipes and data key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora2serve.registry.version_record import Version

OWN = ("name", "number", "added", "aliases", "exports", "scores", "state")


@dataclass(frozen=True)
class VersionDifference:
    """A field that is not the same in both; None where one has it not."""

    field: str
    first: object
    second: object


def differences(first: Version, second: Version) -> list[VersionDifference]:
    """Every field that differs, by name."""
    one, other = _flat(first), _flat(second)
    return [
        VersionDifference(key, one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def _flat(version: Version) -> dict[str, object]:
    content = {key: value for key, value in version.to_json().items() if key not in OWN}
    fields = dict(_leaves("", content))
    fields |= {f"exports.{export.name}": export.unproven or "proven" for export in version.exports}
    newest = {score.name: version.score(score.name) for score in version.scores}
    return fields | {f"scores.{name}": score.value for name, score in newest.items() if score}


def _leaves(path: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(f"{path}.{key}" if path else str(key), item)]
    return [(path, value)]
