"""Quantiles of Student's t, without the libraries of a training."""

from __future__ import annotations

import math
import statistics


def student_t(freedom: int, level: float = 0.975) -> float:
    """A quantile of Student's t, within 1 % from 3 degrees of freedom on (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(level)
    terms: tuple[float, ...] = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
