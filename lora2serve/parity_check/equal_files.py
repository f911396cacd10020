"""Whether two comparisons open equal files in the same engine, which then needs to be asked only once.

An Ollama, an LM Studio and a GGUF export of one type hold the same GGUF.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path

from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.parity_check.comparisons import Comparison


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
    """What the engine opens: a GGUF's parts by number and its Modelfile, else all but the manifest by its name."""
    model = comparison.options.get("model")
    if _inside(comparison, model) and str(model).endswith(".gguf"):
        parts = sorted(Path(str(model)).parent.glob("*.gguf"))
        opened = {str(n): part for n, part in enumerate(parts) if not part.name.startswith("mmproj-")}
        return opened | {key: Path(str(value)) for key, value in comparison.options.items() if key == "modelfile"}
    files = {path.relative_to(export).as_posix(): path for path in export.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if name != MANIFEST}


def _equal(first: Path, second: Path) -> bool:
    return first.samefile(second) or filecmp.cmp(first, second, shallow=False)
