"""What the figures say of data whose truth is known: how often a sound export would be red, and a bad one green."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from lora2serve.parity_check import gates, metrics, thresholds
from lora2serve.parity_check.gates import Behavior
from lora2serve.parity_check.metrics import Estimate, Positions
from lora2serve.parity_check.thresholds import Thresholds

TRUE_P999 = float(np.exp(-6 + 1.5 * 3.0902))  # of the distribution in ``drawn``


def drawn(count: int, seed: int) -> Positions:
    """KL as engines show it: lognormal, so that single positions are a thousand times the median; texts differ."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.standard_normal(-(-count // 64)), 64)[:count]  # neighbors are alike
    kl = np.exp(-6 + 1.5 * (0.5 * level + 0.75**0.5 * rng.standard_normal(count)))
    even = np.ones(count)
    return Positions(kl, even > 0, even * 0, even * 0, even, even * 1e-9, even)


# draws, and resamples of each: weekly twice as many draws as show it, with the interval that users get
DRAWS = pytest.mark.parametrize(
    ("draws", "resamples"), [(10, 100), pytest.param(20, metrics.RESAMPLES, marks=pytest.mark.slow)]
)


def figures(count: int, draws: int) -> Iterator[Estimate]:
    for seed in range(draws):
        yield metrics.figures(drawn(count, seed), np.arange(count) // 256)["p999_kl"]


@pytest.fixture
def only_the_tail(monkeypatch: pytest.MonkeyPatch, resamples: int) -> None:
    """Of all figures the one that is looked at."""
    monkeypatch.setattr(metrics, "RESAMPLES", resamples)
    monkeypatch.setattr(metrics, "STATISTICS", {"p999_kl": metrics.STATISTICS["p999_kl"]})


@DRAWS
@pytest.mark.usefixtures("only_the_tail")
def test_a_tail_of_too_few_positions_is_shown_and_not_judged(draws: int) -> None:
    """Two positions lie beyond: the upper end is the largest value, which is far out for a sound export too."""
    estimates = list(figures(2048, draws))
    assert all(estimate.unjudged for estimate in estimates)
    red = np.mean([estimate.high > 2 * TRUE_P999 for estimate in estimates])
    assert red > 0.1, "the control: judged, it would fail an export that is at half of its bound"


@DRAWS
@pytest.mark.usefixtures("only_the_tail")
def test_a_tail_of_enough_positions_is_judged(draws: int) -> None:
    estimates = list(figures(10_240, draws))
    assert not any(estimate.unjudged for estimate in estimates)
    assert not any(estimate.high > 3 * TRUE_P999 for estimate in estimates), "sound ones"
    assert all(estimate.high > TRUE_P999 / 2 for estimate in estimates), "twice the bound"


def measured(kl: float, base: float, count: int = 512) -> Behavior:
    even = np.ones(count)
    own, other = (Positions(even * x, even > 0, even * 0, even * 0, even, even * 1e-9, even) for x in (kl, base))
    return Behavior(own, other, np.arange(count) // 64, even > 0)


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 100)


def verdict(behavior: Behavior, bounds: Thresholds, noise: float) -> gates.Gate:
    return gates.behavior(behavior, behavior.measure(), bounds, str, noise)


@pytest.mark.usefixtures("fewer_resamples")
def test_what_is_less_than_noise_is_no_signal() -> None:
    """A random model whose adapter changes nothing to speak of: KL of 5e-11 beside 2e-11."""
    bounds, noise = thresholds.lookup("bfloat16"), thresholds.noise("bfloat16")
    assert verdict(measured(5e-11, 2e-11), bounds, noise).status == "met"
    lost = verdict(measured(5e-4, 4e-4), bounds, noise)
    assert lost.status == "missed" and "adapter" in lost.cause, "the control"


@pytest.mark.parametrize("more", [np.nan, 60.0])
def test_tokens_that_the_reference_has_not(more: float) -> None:
    """Garbage rows of a padded vocabulary take the answer, or break it; rows of zeros beside sure logits do not."""
    rng = np.random.default_rng(0)
    reference = (10 * rng.standard_normal((64, 100))).astype(np.float32)
    targets = rng.integers(0, 100, 64)
    padded = np.concatenate([reference, np.full((64, 8), -20, np.float32)], axis=1)
    sound = metrics.compare(reference, padded, targets)
    assert sound.same.all() and sound.kl.max() < 1e-6
    padded[:, -1] = more
    broken = metrics.compare(reference, padded, targets)
    assert not broken.same.any() and broken.kl.min() > 1
    cut = metrics.compare(padded[:, :108] if np.isfinite(more) else reference, reference, targets)
    assert cut.same.all() and cut.kl.max() < 1e-6, "a vocabulary that was cut to its tokens"


def test_answers_part_where_the_reference_is_sure() -> None:
    """A swap of two tokens that are nearly alike to the reference is allowed; one that it is sure of is not."""
    sure = ([1, 2, 3], [[[1, 0.0], [9, 4.0]], [[2, 0.0], [7, 0.01]], [[3, 0.0], [0, 2.0]], [[0, 0.0], [5, 3.0]]])
    stop, tie = (0,), 0.1
    gaps = [gates.greedy([sure], [answer], stop).gaps[0] for answer in ([1, 2, 3], [1, 7], [9], [1, 2], [1, 2, 3, 5])]
    assert gaps == [0.0, 0.01, 4.0, 2.0, 3.0]
    alike = gates.greedy([sure] * 2, [[1, 2, 3], [1, 7, 8]], stop)
    assert (alike.equal, alike.excusable(tie)) == (0.5, 1.0)
    stopped = gates.greedy([sure] * 2, [[1, 2], [1, 2, 3]], stop)
    assert (stopped.equal, stopped.excusable(tie)) == (0.5, 0.5)
    unknown = gates.greedy([sure], [[77]], stop)
    assert unknown.gaps == (float("inf"),)


@pytest.mark.parametrize("kind", ["Q8_0", "w8a16", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "fp8", "int8"])
def test_perplexity_may_move_as_far_as_the_bound_on_kl_lets_it(kind: str) -> None:
    """Sound exports were red otherwise: in 8 bits it moved by 0.004 at a KL of 0.0004, a tenth of its bound."""
    bounds = thresholds.lookup(kind)
    assert bounds.mean_kl and bounds.ln_ppl_ratio and bounds.ln_ppl_ratio >= 0.17 * (2 * bounds.mean_kl) ** 0.5
