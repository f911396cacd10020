"""What stands in the files of the code, each of which is parsed once: imports, classes, functions."""

from __future__ import annotations

import ast
import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lora2serve.system.small_files import write_text
from tests.support.shared import once

ROOT = Path(__file__).parents[2]
PACKAGES = ("lora2serve", "converters")
OURS = Path(__file__).read_text(encoding="utf-8")
KNOWN = ROOT / ".pytest_cache" / "outlines.json"
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@dataclass
class Outline:
    """One file; dotted names of imports, and ``top`` those that run when it is imported."""

    imports: list[str] = field(default_factory=list)
    top: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    functions: list[tuple[str, int]] = field(default_factory=list)  # line and name, lines


def outline(source: str) -> Outline:
    tree, found = ast.parse(source), Outline()
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef):
            found.classes.append(node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.functions.append((f"{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1))
        else:
            found.imports += _imported(node)
    found.top = [name for node in tree.body for name in _imported(node)]
    return found


def outlines(factory: pytest.TempPathFactory) -> dict[Path, Outline]:
    """Those of all modules; the workers of pytest share them."""
    return _read(once(factory, "outlines", _write) / "outlines.json")


@cache
def _read(file: Path) -> dict[Path, Outline]:
    return {Path(path): Outline(**content) for path, content in json.loads(file.read_text()).items()}


def _write(folder: Path) -> None:
    texts = {str(path): path.read_text(encoding="utf-8") for path in MODULES}
    names = {path: _digest(text) for path, text in texts.items()}
    known = _known()
    with _without_collector():
        known = {name: known.get(name) or asdict(outline(texts[path])) for path, name in names.items()}
    with suppress(OSError):
        KNOWN.parent.mkdir(exist_ok=True)
        write_text(KNOWN, json.dumps(known))
    (folder / "outlines.json").write_text(json.dumps({path: known[name] for path, name in names.items()}))


def _known() -> dict[str, Any]:
    """Those of the last run, by a file's content: between two edits few files are others."""
    try:
        known: dict[str, Any] = json.loads(KNOWN.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _digest(text: str) -> str:
    """Also of this file, which says what is noted."""
    return hashlib.sha256(f"{OURS}{text}".encode()).hexdigest()


@contextmanager
def _without_collector() -> Iterator[None]:
    """It would go through half a million nodes again and again: two thirds of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """All of them, at whatever depth; ``ast.walk`` goes into every expression, too, in which no statement stands."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, name, ()))
        for name in ("handlers", "cases"):
            for part in getattr(node, name, ()):
                yield from _statements(part.body)
