"""Whether two comparisons open equal files in the same engine, which then needs to be asked only once.

An Ollama, an LM Studio and a GGUF export of one type hold the same GGUF. What a Modelfile sets beside it (penalties,
stops, length) must not change an answer.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.exporting import settings_plan
from lora2serve.parity_check.comparisons import Comparison
from lora2serve.parity_check.engines.own_sampling import OwnSampling, of_gguf, of_modelfile


def opens_the_same(first: Comparison, second: Comparison) -> bool:
    """Whether engine, options, bounds, reference and every byte that the engine opens are equal."""
    if first.path is None or second.path is None:
        return False
    alike = ("engine", "kind", "reference")
    if any(getattr(first, name) != getattr(second, name) for name in alike) or _rest(first) != _rest(second):
        return False
    one, other = _files(first, first.path), _files(second, second.path)
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _rest(comparison: Comparison) -> dict[str, object]:
    """The options that name no path of the export."""
    return {key: value for key, value in comparison.options.items() if not _inside(comparison, value)}


def _inside(comparison: Comparison, value: object) -> bool:
    assert comparison.path is not None
    return isinstance(value, str) and Path(value).is_relative_to(comparison.path)


def _files(comparison: Comparison, export: Path) -> Mapping[str, Path]:
    """What the engine opens: the parts of one GGUF by their number, else everything beside the manifest by its name."""
    model = _gguf(comparison)
    if model:
        parts = [part for part in sorted(model.parent.glob("*.gguf")) if not part.name.startswith("mmproj-")]
        return {str(number): part for number, part in enumerate(parts)}
    files = {path.relative_to(export).as_posix(): path for path in export.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if name != MANIFEST}


def _gguf(comparison: Comparison) -> Path | None:
    """The model of an export that is a GGUF."""
    model = comparison.options.get("model")
    return Path(str(model)) if _inside(comparison, model) and str(model).endswith(".gguf") else None


def _equal(first: Path, second: Path) -> bool:
    return first.samefile(second) or filecmp.cmp(first, second, shallow=False)


def answers_the_same(asked: Comparison, texts: Sequence[str], other: Comparison) -> bool:
    """Whether the answers ``texts`` to ``asked``, which opens the same, are those to ``other`` too.

    They are where both have the same penalties and length, and no word that ends an answer of one of them comes up.
    """
    if _modelfile(asked) is None and _modelfile(other) is None:
        return True
    try:
        first, second = _own_sampling(asked), _own_sampling(other)
    except ValueError:  # a Modelfile that cannot be read: the engine says so
        return False
    if replace(first, stops=()) != replace(second, stops=()):
        return False
    more = [word for word in second.stops if word not in first.stops]
    return {*first.stops} <= {*second.stops} and not any(word in text for word in more for text in texts)


def _modelfile(comparison: Comparison) -> str | None:
    name = comparison.options.get("modelfile")
    return str(name) if name else None


def _own_sampling(comparison: Comparison) -> OwnSampling:
    name, model = _modelfile(comparison), _gguf(comparison)
    if name:
        return of_modelfile(Path(name))
    if model is None:
        return OwnSampling()
    return of_gguf({key: str(item.value) for key, item in settings_plan.read_gguf(model).items()})
