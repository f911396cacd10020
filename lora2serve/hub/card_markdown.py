"""Tables, figures and their names, the same on a model card and on the page of a parity report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TITLES: Mapping[str, str] = {
    "mean_kl": "mean KL divergence (nats)",
    "median_kl": "median KL",
    "p99_kl": "99 % KL",
    "p999_kl": "99.9 % KL",
    "top1": "same top token",
    "top1_but_ties": "same top token, ties apart",
    "ln_ppl_ratio": "ln(perplexity / that of the trained model)",
    "abs_delta": "mean difference of the true token's log-probability",
    "nmse": "NMSE of logits",
    "retention": "adapter's signal kept",
    "equal_answers": "same greedy answers",
    "first_difference": "first difference excusable",
    "tensors": "tensors compared",
    "tensor_nmse": "NMSE of the worst tensor",
    "block_nmse": "NMSE of the worst 256 values",
}


def title(name: str) -> str:
    """A figure's name in words."""
    return TITLES.get(name, name.replace("_", " "))


def figure(name: str, value: Any) -> str:
    """A figure as a reader takes it in: shares as percentages, the rest to a few digits; empty where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if name in ("top1", "top1_but_ties"):
        return f"{value:.2%}"
    if name == "equal_answers":
        return f"{value:.0%}"
    if name == "retention":  # KL(tuned, export) / KL(tuned, base): what of the adapter got lost
        return f"{1 - value:.2%}"
    return number(value)


def number(value: Any) -> str:
    """To four digits at most."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown, as the Hub renders it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text: Any) -> str:
    """Text that stays within its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def yaml(data: Mapping[str, Any]) -> str:
    """A block of YAML."""
    import yaml as pyyaml

    return str(pyyaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def listed(words: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
