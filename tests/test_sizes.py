"""Files and functions stay small, and typed: ceilings that may be lowered, and not raised."""

from __future__ import annotations

import re
from statistics import median

import pytest

from tests.support.outlines import MODULES, ROOT, outlines

SOURCES = {path: path.read_text(encoding="utf-8") for path in MODULES}

LONGEST_FILE, MEDIAN_FILE = 350, 120  # lines
LONGEST_FUNCTION, MEDIAN_FUNCTION = 45, 7
ANY, UNTYPED_DICTS = 249, 79


def test_files() -> None:
    lines = {str(path.relative_to(ROOT)): len(text.splitlines()) for path, text in SOURCES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}
    assert median(lines.values()) <= MEDIAN_FILE


def test_functions(tmp_path_factory: pytest.TempPathFactory) -> None:
    lines = {
        f"{path.relative_to(ROOT)}:{name}": count
        for path, content in outlines(tmp_path_factory).items()
        for name, count in content.functions
    }
    assert len(lines) > 3000
    assert {name: count for name, count in lines.items() if count > LONGEST_FUNCTION} == {}
    assert median(lines.values()) <= MEDIAN_FUNCTION


def most(pattern: str) -> tuple[int, str]:
    """How often it stands in the code, and in which files most."""
    counts = {str(path.relative_to(ROOT)): len(re.findall(pattern, text)) for path, text in SOURCES.items()}
    worst = sorted(counts.items(), key=lambda item: -item[1])[:10]
    return sum(counts.values()), ", ".join(f"{name} {count}" for name, count in worst)


def test_any() -> None:
    """`Any` stands only where a foreign library or JSON itself gives it."""
    count, worst = most(r"\bAny\b")
    assert 0 < count <= ANY, worst
    count, worst = most(r"\b(?:dict|Mapping|MutableMapping)\[str, Any\]")
    assert 0 < count <= UNTYPED_DICTS, worst
