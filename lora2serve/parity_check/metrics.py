"""What parity measures: pure functions on numpy arrays, every sum in float64.

Shapes: P positions (one per predicted token), V tokens in the vocabulary. "Reference" is the trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Array = NDArray[np.float32]
Ints = NDArray[np.int64]

ENTRIES = 1 << 20  # positions x tokens reduced at once: 8 MB for each of the ten working arrays
BOOTSTRAP_BLOCK = 32  # positions of one bootstrap block: neighbors in a text are not independent
RESAMPLES = 1000
CONFIDENCE = 0.95
BEYOND = 10  # positions that must lie beyond a quantile: with fewer the end of its interval is the largest value


def log_softmax(values: NDArray[np.floating]) -> Floats:
    """(P, V) logits or log-probabilities -> (P, V) log-probabilities."""
    shifted = values.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@dataclass(frozen=True)
class Positions:
    """Figures for every position, each (P,); ``error`` and ``power`` are NaN where only the top k is known."""

    kl: Floats  # KL(reference || export) in nats; a lower bound where only the top k is known
    same: NDArray[np.bool_]  # the same most likely token
    margin: Floats  # log-probability that the reference gives its own choice over the export's
    delta: Floats  # log-probability of the true next token, export minus reference
    loss: Floats  # -log-probability of the true next token in the reference
    error: Floats  # sum over V of the squared difference of centered logits
    power: Floats  # sum over V of the squared centered logits of the reference

    def __len__(self) -> int:
        return len(self.kl)

    def take(self, where: NDArray[np.bool_] | slice) -> Positions:
        """The positions where ``where`` holds, or those of a part."""
        return Positions(**{name: getattr(self, name)[where] for name in FIELDS})


FIELDS = ("kl", "same", "margin", "delta", "loss", "error", "power")


def join(parts: Sequence[Positions]) -> Positions:
    """Several in one."""
    return Positions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


def compare(reference: Array, values: Array, targets: Ints) -> Positions:
    """Compare (P, V) logits or log-probabilities with the reference's; ``targets`` are the (P,) true next tokens.

    ``values`` may have more tokens than the reference, as a vocabulary with padding; what they say of those counts too.
    Fewer: the reference is cut, since no true token lies there. A NaN or an infinity in ``values`` makes the KL of that
    position infinite.
    """
    vocab = min(reference.shape[1], values.shape[1])
    step = max(1, ENTRIES // values.shape[1])
    parts = (slice(start, start + step) for start in range(0, len(targets), step))
    return join([_compare(reference[part, :vocab], values[part], targets[part]) for part in parts])


def _compare(reference: Array, everything: Array, targets: Ints) -> Positions:
    """``everything``: also of tokens that the reference has not, which take their part of the probability."""
    vocab = reference.shape[1]
    values, beyond = everything[:, :vocab], everything[:, vocab:]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        ref, got = log_softmax(reference), log_softmax(everything)[:, :vocab]
        kl = (np.exp(ref) * (ref - got)).sum(axis=1)
    broken = ~np.isfinite(values).all(axis=1) | ~np.isfinite(kl) | np.isnan(beyond).any(axis=1)
    kl = np.where(broken, np.inf, np.maximum(kl, 0.0))
    here = np.arange(len(targets))
    best, chosen = ref.argmax(axis=1), np.where(broken, -1, got.argmax(axis=1))
    other_token = beyond.max(axis=1, initial=-np.inf) > values.max(axis=1)
    centered = ref - ref.mean(axis=1, keepdims=True)
    other = got - got.mean(axis=1, keepdims=True)
    return Positions(
        kl=kl,
        same=(best == chosen) & ~other_token,
        margin=np.where(broken | other_token, np.inf, ref[here, best] - ref[here, np.maximum(chosen, 0)]),
        delta=got[here, targets] - ref[here, targets],
        loss=-ref[here, targets],
        error=((other - centered) ** 2).sum(axis=1),
        power=(centered**2).sum(axis=1),
    )


def compare_top(reference: Array, ids: Ints, top: Array, target: Array, targets: Ints) -> Positions:
    """As ``compare`` where an engine shows only its top k: ``ids`` and ``top`` are (P, k), -1 where there are fewer.

    ``target`` is the engine's (P,) log-probability of the true next token, NaN where it did not say.
    The KL is that of the coarser distribution in which all other tokens are one: never more than the true one.
    It is NaN where no token is known at all.
    """
    figures = []
    for row in range(len(targets)):
        ref = log_softmax(reference[row : row + 1])[0]
        known = ids[row] >= 0
        if not known.any():
            figures.append((np.nan, False, np.nan, np.nan, -ref[targets[row]]))
            continue
        if not np.isfinite(top[row][known]).all():
            figures.append((np.inf, False, np.inf, np.nan, -ref[targets[row]]))
            continue
        names, got = ids[row][known], top[row][known].astype(np.float64)
        kl = lumped_kl(ref[names], got)
        best, chosen = int(ref.argmax()), int(names[got.argmax()])
        figures.append(
            (kl, best == chosen, ref[best] - ref[chosen], target[row] - ref[targets[row]], -ref[targets[row]])
        )
    kls, same, margin, delta, loss = (np.array(column) for column in zip(*figures, strict=True))
    unknown = np.full(len(targets), np.nan)
    return Positions(kls, same.astype(bool), margin, delta, loss, unknown, unknown)


def lumped_kl(ref: Floats, got: Floats) -> float:
    """KL of two distributions in nats from the log-probabilities of some tokens, all others being one."""
    p, q = np.exp(ref), np.exp(got)
    rest_p, rest_q = max(1.0 - float(p.sum()), 0.0), max(1.0 - float(q.sum()), 1e-9)
    rest = rest_p * np.log(rest_p / rest_q) if rest_p > 1e-9 else 0.0
    return max(float((p * (ref - got)).sum() + rest), 0.0)


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its confidence interval; ``unjudged``: why the data cannot tell where they are."""

    value: float
    low: float
    high: float
    unjudged: str = ""


Statistic = Callable[[Positions], float]


def mean_kl(positions: Positions) -> float:
    """Nats."""
    return float(positions.kl.mean())


def quantile_kl(share: float) -> Statistic:
    """Nats; the value that ``share`` of the positions do not exceed."""

    def statistic(positions: Positions) -> float:
        return float(np.quantile(positions.kl, share, method="higher"))

    return statistic


def top1(positions: Positions) -> float:
    """Share of positions with the same most likely token."""
    return float(positions.same.mean())


def top1_but_ties(positions: Positions) -> float:
    """As ``top1``, but a swap of two tokens that are equal to the reference, within 1e-4 nats, is no difference."""
    return float((positions.same | (positions.margin <= 1e-4)).mean())


def ln_ppl_ratio(positions: Positions) -> float:
    """ln(perplexity of the export / perplexity of the reference), over the true next tokens."""
    known = positions.delta[~np.isnan(positions.delta)]
    return float(-known.mean()) if len(known) else np.nan


def mean_delta(positions: Positions) -> float:
    """Mean change in log-probability of the true next token; its absolute values."""
    known = positions.delta[~np.isnan(positions.delta)]
    return float(np.abs(known).mean()) if len(known) else np.nan


def nmse(positions: Positions) -> float:
    """Squared error of the centered logits over their squared sum: what a softmax does not see is left out."""
    return float(positions.error.sum() / positions.power.sum())


TAILS = {"p99_kl": 0.99, "p999_kl": 0.999}
STATISTICS: Mapping[str, Statistic] = {
    "mean_kl": mean_kl,
    "median_kl": quantile_kl(0.5),
    **{name: quantile_kl(share) for name, share in TAILS.items()},
    "top1": top1,
    "top1_but_ties": top1_but_ties,
    "ln_ppl_ratio": ln_ppl_ratio,
    "abs_delta": mean_delta,
    "nmse": nmse,
}


def figures(positions: Positions, sequences: Ints) -> dict[str, Estimate]:
    """Every statistic with its block-bootstrap interval; ``sequences`` is (P,), the sequence of each position.

    Statistics that need what the engine does not show are left out.
    """
    values = {name: statistic(positions) for name, statistic in STATISTICS.items()}
    finite = [name for name, value in values.items() if np.isfinite(value)]
    drawn: dict[str, list[float]] = {name: [] for name in finite}
    for sample in _resamples(blocks(sequences)) if finite else ():
        part = _at(positions, sample)
        for name in finite:
            drawn[name].append(STATISTICS[name](part))
    return {
        name: Estimate(
            value,
            *(_interval(np.array(drawn[name])) if name in drawn else (value, value)),
            too_few(name, len(positions)),
        )
        for name, value in values.items()
        if not np.isnan(value)
    }


def too_few(name: str, positions: int) -> str:
    """Why so many positions give a figure no interval, or nothing: of a quantile, ``BEYOND`` must lie beyond it."""
    if name not in TAILS or round(positions * (1 - TAILS[name])) >= BEYOND:
        return ""
    return f"needs {round(BEYOND / (1 - TAILS[name])):,} positions"


def ratio(above: Floats, below: Floats, sequences: Ints) -> Estimate:
    """sum(above) / sum(below) with its interval: signal retention."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(above.sum() / below.sum())
        if not np.isfinite(value):
            return Estimate(np.inf, np.inf, np.inf)
        drawn = np.array([above[sample].sum() / below[sample].sum() for sample in _resamples(blocks(sequences))])
    return Estimate(value, *_interval(drawn))


def blocks(sequences: Ints) -> list[Ints]:
    """Runs of at most ``BOOTSTRAP_BLOCK`` positions of one sequence: the units that are drawn."""
    edges = np.flatnonzero(np.diff(sequences)) + 1
    runs = np.split(np.arange(len(sequences)), edges)
    return [run[start : start + BOOTSTRAP_BLOCK] for run in runs for start in range(0, len(run), BOOTSTRAP_BLOCK)]


def _resamples(units: Sequence[Ints]) -> Sequence[Ints]:
    rng = np.random.default_rng(0)  # the same draws every time: the same data gives the same verdict
    return [np.concatenate([units[k] for k in rng.integers(len(units), size=len(units))]) for _ in range(RESAMPLES)]


def _at(positions: Positions, index: Ints) -> Positions:
    return Positions(**{name: getattr(positions, name)[index] for name in FIELDS})


def _interval(drawn: Floats) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn[~np.isnan(drawn)], [tail, 1 - tail])
    return float(low), float(high)
