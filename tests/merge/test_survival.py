"""How much of a change is left after the cast, on bases of a finer type than what is written."""

from __future__ import annotations

import pytest
import torch

from lora2serve.errors import MergeError
from lora2serve.merge.survival import Survival
from lora2serve.weights.tensors import TensorSpec

STEP = 2.0**-7  # of bfloat16 from 1 to 2


def counted(delta: float, seed: int, blocks: int = 4) -> tuple[Survival, float]:
    """Of a float32 base from 1 to 2; and the share without the angle."""
    torch.manual_seed(seed)
    before = torch.rand(256, 1024) + 1
    after = before + torch.randn(256, 1024) * delta
    survival = Survival()
    for first, second in zip(before.chunk(blocks), after.chunk(blocks), strict=True):
        survival.add(TensorSpec("w", (256, 1024), "BF16"), first, second, None, on_grid=False)
    moved = (after.bfloat16().float() - before.bfloat16().float()).norm() / (after - before).norm()
    return survival, float(moved)


@pytest.mark.parametrize("seed", range(5))
def test_values_that_are_tipped_over_are_no_delta(seed: int) -> None:
    survival, moved = counted(4e-5 * STEP, seed)
    assert moved > 50, "the control: a few values move a whole step, many times the delta"
    with pytest.raises(MergeError, match=r"the adapter changes nothing: at most 0\.00"):
        survival.check()


@pytest.mark.parametrize(
    ("steps", "least", "most"), [(1e-3, 0.015, 0.04), (0.1, 0.2, 0.4), (1, 0.85, 0.95), (10, 0.99, 1.0)]
)
def test_larger_deltas_survive(steps: float, least: float, most: float) -> None:
    (share,) = counted(steps * STEP, 0)[0].shares().values()
    assert least < share <= most


def test_sums_of_another_process() -> None:
    """They are JSON on the way."""
    survival, other = counted(STEP, 0)[0], Survival()
    other.take(survival.sums(["w"]))
    assert other.shares() == survival.shares()
    one = counted(STEP, 0, blocks=1)[0].shares()["w"]
    assert one == pytest.approx(survival.shares()["w"], rel=1e-4)
