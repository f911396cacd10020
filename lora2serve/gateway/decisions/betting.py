"""An e-process by betting: evidence against "the mean of what comes is at most zero" that is valid at every look.

A gambler who stakes the share s of his wealth on each observation z has the wealth prod(1 + s z). While the mean of
each z, given what came before, is at most zero, no choice of s makes him rich: the mean of several such gamblers is a
nonnegative supermartingale that begins at one, so that it ever reaches 1/alpha with a probability of at most alpha
(Ville's inequality). It may be looked at after each observation, and stopped at any. Source: Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 86 (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Shares of the wealth, of the most that can be staked: the small ones find small differences late, the large ones large
# differences early.
STAKES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)


class EProcess:
    """Gamblers with one stake each, on observations that are at least ``-worst``.

    ``wealth`` is the logarithm of what each has, by which it goes on after a restart.
    """

    def __init__(self, worst: float, wealth: Sequence[float] = ()) -> None:
        self._stakes = [stake / worst for stake in STAKES]
        self.wealth = list(wealth) if len(wealth) == len(STAKES) else [0.0] * len(STAKES)

    def bet(self, z: float) -> None:
        """Bet on one more observation."""
        for number, stake in enumerate(self._stakes):
            self.wealth[number] += math.log1p(stake * z)

    @property
    def log_e(self) -> float:
        """The natural logarithm of the e-value: of the mean wealth."""
        return log_mean(self.wealth)


def log_mean(logs: Sequence[float]) -> float:
    """The natural logarithm of the mean of what ``logs`` are the logarithms of: the mean of e-values is one, too."""
    most = max(logs)
    return most + math.log(sum(math.exp(each - most) for each in logs) / len(logs))
