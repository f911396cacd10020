"""Figures in words, the same in the terminal, the page and the summary."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lora2serve.parity_check.gates import Metric

NAMES: Mapping[str, str] = {
    "mean_kl": "Mean KL (nats)",
    "median_kl": "Median KL",
    "p99_kl": "KL, 99th percentile",
    "p999_kl": "KL, 99.9th percentile",
    "top1": "Same top token",
    "top1_but_ties": "Same top token, ties apart",
    "ln_ppl_ratio": "ln(perplexity / trained)",
    "abs_delta": "Mean |Δ log-probability| of the true token",
    "nmse": "NMSE of logits",
    "retention": "KL(tuned, export) / KL(tuned, base)",
    "equal_answers": "Same greedy answers",
    "first_difference": "First difference excusable",
    "equal prompts": "Prompts equal byte for byte",
    "equal ids": "Prompts with equal ids",
    "tensors": "Tensors compared",
    "tensor_nmse": "NMSE of the worst tensor",
    "block_nmse": "NMSE of the worst 256 values",
}


def figure(name: str, check: Metric | None) -> str:
    """One figure for a table; ``-`` where there is none."""
    if check is None:
        return "-"
    if name in ("top1", "top1_but_ties"):
        return f"{check.value:.2%}"
    if name == "equal_answers":
        return f"{check.value:.0%}"
    if name == "retention":
        return f"{1 - check.value:.2%}" if math.isfinite(check.value) else "-"
    return f"{check.value:.2g}"
