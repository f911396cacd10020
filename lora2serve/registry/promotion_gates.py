"""What a version must meet before an alias may point to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from lora2serve.config.bounds import Range
from lora2serve.config.schema import build, read_keys, show
from lora2serve.errors import RecipeError, did_you_mean
from lora2serve.registry.version_record import JudgedGate, Version

FILE = "gates.yaml"  # in the folder of a registry
EXAMPLE = "such as `suites: {medqa.acc: 0.01}`: not worse than the version before by more than that"


@dataclass(frozen=True)
class GateRecipe:
    """``suites``: SUITE.METRIC -> by how much it may be worse than that of the version that is replaced."""

    suites: Mapping[str, Annotated[float, Range(0.0, 1e9)]] = field(default_factory=dict)


def read_gates(path: Path) -> GateRecipe:
    """The gates in a YAML file; RecipeError names every problem in it."""
    content, problems = read_keys(path, EXAMPLE)
    gates = build(GateRecipe, content, problems)
    problems += [
        f"suites: {show(name)}, expected SUITE.METRIC" for name in gates.suites if not all(name.partition(".")[::2])
    ]
    if problems:
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems), EXAMPLE)
    return gates


def judged(version: Version, champion: Version | None, gates: GateRecipe) -> list[JudgedGate]:
    """Each gate that is asked, with what it says; ``champion`` is the version that the alias points to now."""
    active = version.state == "active"
    found = [JudgedGate("state", active, "active" if active else f"{version.reference} is {version.state}")]
    unproven = [f"{export.name}: {export.unproven}" for export in version.exports if export.unproven]
    if not version.exports:
        unproven = ["it has no export, so parity was not run"]
    found += [JudgedGate("parity", False, reason) for reason in unproven]
    if not unproven:
        found.append(JudgedGate("parity", True, ", ".join(export.name for export in version.exports)))
    if champion is None or champion.number == version.number:
        return found
    bases = f"{version.base or 'unknown'}, {champion.reference} is of {champion.base or 'unknown'}"
    found.append(JudgedGate("base", same_base(version, champion), bases))
    return [*found, *(_compared(name, version, champion, gates) for name in gates.suites)]


def same_base(one: Version, other: Version) -> bool:
    """Whether both are of one base: by its content where that is known of both, else by its name."""
    if one.base_sha256 and other.base_sha256:
        return one.base_sha256 == other.base_sha256
    return one.base == other.base


def _compared(name: str, version: Version, champion: Version, gates: GateRecipe) -> JudgedGate:
    """The gate of a suite; it is met, too, where the champion was never measured on it."""
    new, old, margin = version.score(name), champion.score(name), gates.suites[name]
    if new is None:
        near = did_you_mean(name, [score.name for score in (*version.scores, *champion.scores)]) if old is None else ""
        return JudgedGate(name, False, f"{version.reference} was not measured on it{near}")
    if old is None:
        return JudgedGate(name, True, f"{new.value:g}, {champion.reference} was not measured on it")
    if new.suite_sha256 != old.suite_sha256:
        reason = f"measured on another suite than that of {champion.reference}, so the two cannot be compared"
        return JudgedGate(name, False, reason)
    loss = (old.value - new.value) if new.higher_is_better else (new.value - old.value)
    met = loss <= margin + 1e-12 * max(abs(old.value), abs(new.value))  # 0.75 - 0.74 is a little more than 0.01
    return JudgedGate(name, met, f"{new.value:g}, {champion.reference} has {old.value:g} (margin {margin:g})")
