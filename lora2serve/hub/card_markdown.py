"""Pieces of Markdown and YAML, the same on a model card and on the page of a parity report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lora2serve.console import printable

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,:;()/+%=_-]*")  # no markup, no mention, no entity


def number(value: object) -> str:
    """To four digits at most; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:z.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown, as the Hub renders it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text: object) -> str:
    """Text that stays within its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def literal(text: object) -> str:
    """One line of text in which nothing is markup: as it is where it has none, else as code."""
    line = printable(" ".join(str(text).split()), line_ends=False)
    if PLAIN.fullmatch(line):
        return line
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def yaml(data: Mapping[str, object]) -> str:
    """A block of YAML."""
    import yaml as pyyaml

    return str(pyyaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def listed(words: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
