"""Pieces of Markdown and YAML, the same on a model card and on the page of a parity report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def number(value: object) -> str:
    """To four digits at most; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown, as the Hub renders it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text: object) -> str:
    """Text that stays within its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def yaml(data: Mapping[str, object]) -> str:
    """A block of YAML."""
    import yaml as pyyaml

    return str(pyyaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def listed(words: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
