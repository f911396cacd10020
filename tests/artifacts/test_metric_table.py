"""Metrics by name: every one has its words, and its bound is on the right side wherever it is written."""

from __future__ import annotations

import math
import re

import pytest

from lora2serve.artifacts.metric_table import METRICS, bound, figure, head, higher_is_better, interval, label
from lora2serve.parity_check.metrics import STATISTICS
from lora2serve.parity_check.thresholds import NAMES


def test_every_metric_has_words() -> None:
    """Those that are measured and those that have bounds; the control: one that is not known shows its name."""
    measured = {*STATISTICS, *NAMES, "retention", "equal_answers", "first_difference", "block_nmse", "known"}
    assert measured <= METRICS.keys()
    assert label("some_other") == head("some_other") == "some other"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("top1_but_ties", 1.0, "≥ 100.00%"),
        ("first_difference", 1.0, "≥ 100%"),
        ("top1", 0.99, "≥ 99.00%"),
        ("mean_kl", 1e-3, "≤ 0.001"),
        ("tensor_nmse", 0.0, "≤ 0"),
        ("retention", 0.1, "≥ 90.00%"),  # measured is what is lost, shown what is kept
    ],
)
def test_bounds(name: str, value: float, shown: str) -> None:
    assert bound(name, value) == shown
    assert bound(name, None) == ""
    assert higher_is_better(name) == (name in ("top1_but_ties", "first_difference", "top1"))


def test_figures_and_intervals() -> None:
    assert [figure(name, 0.98765) for name in ("mean_kl", "top1", "equal_answers", "retention")] == [
        "0.99", "98.77%", "99%", "1.23%",
    ]  # fmt: skip
    assert (figure("tensors", 30), figure("mean_kl", None), figure("retention", math.inf)) == ("30", "", "")
    assert interval("retention", 0.1, 0.2) == "80.00% to 90.00%"
    assert interval("mean_kl", 0.1, 0.2) == "0.1 to 0.2"
    assert interval("mean_kl", 0.1, 0.1) == interval("mean_kl", None, None) == ""


def test_no_negative_zero() -> None:
    for name in METRICS:
        assert not re.match(r"-0(\.0+)?%?$", figure(name, -0.0)), name
        assert not re.match(r"-0(\.0+)?%$", figure(name, 1 + 1e-9)), name
    assert figure("mean_kl", -0.5).startswith("-"), "the control"
