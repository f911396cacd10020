"""What parity measures, by name: the words for it, which way is better, and how a figure is written.

Every table, page, card and verdict looks here. ``docs/parity.md`` says what each figure is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricInfo:
    """One metric: its name in words, the shorter one at the head of a column, its unit, and a sentence on what it is.

    ``style``: a share with its decimals, a share of answers without, ``rest`` for a lost share that is shown as what is
    kept, or a plain number.
    """

    label: str
    head: str = ""
    higher_is_better: bool = False
    style: Literal["number", "share", "answers", "rest"] = "number"
    unit: str = ""
    meaning: str = ""


METRICS: Mapping[str, MetricInfo] = {
    "mean_kl": MetricInfo(
        "Mean KL divergence (nats)",
        "Mean KL",
        unit="nats",
        meaning="How far the export's probabilities for the next token are from the trained model's, on average over "
        "all scored tokens, in nats (units of the natural logarithm): 0 is equal.",
    ),
    "median_kl": MetricInfo("Median KL", "Median KL", unit="nats"),
    "p99_kl": MetricInfo("KL, 99th percentile", "99 % KL", unit="nats"),
    "p999_kl": MetricInfo("KL, 99.9th percentile", "99.9 % KL", unit="nats"),
    "top1": MetricInfo(
        "Same top token",
        "Same top token",
        True,
        "share",
        meaning="How often the likeliest next token is the trained model's.",
    ),
    "top1_but_ties": MetricInfo("Same top token, ties apart", "", True, "share"),
    "ln_ppl_ratio": MetricInfo("ln(perplexity / that of the trained model)", "ln(perplexity ratio)"),
    "abs_delta": MetricInfo("Mean |Δ log-probability| of the true token"),
    "nmse": MetricInfo("NMSE of logits"),
    "long_kl": MetricInfo("Mean KL at the end of the long text", "KL far in"),
    # measured is what is lost: KL(tuned, export) / KL(tuned, base)
    "retention": MetricInfo(
        "Adapter's signal kept",
        "Signal kept",
        False,
        "rest",
        meaning="How much of what the training changed is still there: at 100 % all of it, at 0 % the export answers "
        "like the base.",
    ),
    "known": MetricInfo("Positions that the engine could be asked for", "", True, "share"),
    "equal_answers": MetricInfo(
        "Same greedy answers",
        "Same answers",
        True,
        "answers",
        meaning="How many answers to held-out prompts are the trained model's, word for word.",
    ),
    "first_difference": MetricInfo("First difference excusable", "", True, "answers"),
    "settings": MetricInfo("Settings compared"),
    "settings allowed": MetricInfo("Settings that differ on purpose"),
    "equal prompts": MetricInfo("Prompts equal byte for byte"),
    "equal ids": MetricInfo("Prompts with equal ids"),
    "tensors": MetricInfo("Tensors compared"),
    "equal_tensors": MetricInfo("Tensors equal to the byte", "", True, "share"),
    "repeated": MetricInfo("Made again to compare"),
    "strength": MetricInfo("Strength of the adapter in the weights"),
    "tensor_nmse": MetricInfo("NMSE of the worst tensor"),
    "block_nmse": MetricInfo("NMSE of the worst 256 values"),
}
OVERVIEW = ("mean_kl", "top1", "equal_answers", "retention")  # the figures that every table begins with


def info(name: str) -> MetricInfo:
    """What is known of a metric; of one that another version measured, its name."""
    return METRICS.get(name) or MetricInfo(name.replace("_", " "))


def label(name: str) -> str:
    """A metric's name in words."""
    return info(name).label


def head(name: str) -> str:
    """The head of its column."""
    return info(name).head or info(name).label


def head_with_unit(name: str) -> str:
    """The same with the unit behind it."""
    return f"{head(name)}, {info(name).unit}" if info(name).unit else head(name)


def higher_is_better(name: str) -> bool:
    """Whether the measured value has a lower bound and not an upper one."""
    return info(name).higher_is_better


def figure(name: str, value: float | None, digits: int = 2) -> str:
    """A value as it is shown, plain numbers to ``digits``; empty where there is none."""
    if value is None:
        return ""
    style = info(name).style
    if not math.isfinite(value) and style != "number":
        return ""
    if style == "rest":
        return f"{1 - value:z.2%}"  # z: no "-0"
    if style != "number":
        return f"{value:z.2%}" if style == "share" else f"{value:z.0%}"
    return str(value) if isinstance(value, int) else f"{value:z.{digits}g}"


def interval(name: str, low: float | None, high: float | None, digits: int = 2) -> str:
    """The ends of a confidence interval as they are shown, the smaller one first; empty where they are one."""
    if low is None or high is None or low == high:
        return ""
    ends = (high, low) if info(name).style == "rest" else (low, high)
    first, second = (figure(name, end, digits) for end in ends)
    return f"{first} to {second}" if first and second and first != second else ""


def bound(name: str, value: float | None, digits: int = 4) -> str:
    """``≤ 0.001`` or ``≥ 99.00%``; empty where a metric is shown and not judged."""
    if value is None:
        return ""
    at_least = higher_is_better(name) != (info(name).style == "rest")
    return f"{'≥' if at_least else '≤'} {figure(name, value, digits)}"
