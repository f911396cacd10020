"""How much of a change is in a tensor, whatever the change has to do with the plan, and whatever a quantizer keeps."""

from __future__ import annotations

import pytest
import torch

from lora2serve.parity_check.tensor_difference import ChangeSums


def measured(size: float, strength: float, step: float = 0.0, share: float = 1.0) -> tuple[float, float]:
    """Of a change of ``size`` that leans along the base, stored at ``strength``, in steps, with a ``share`` of it kept."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(64, 512, generator=draw).double()
    change = size * (torch.randn(64, 512, generator=draw).double() + 0.5 * base)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return (values / step).round() * step if step else values

    sums = ChangeSums()
    sums.add(change, base + change, share * rounded(base + strength * change), rounded(base + change))
    result = sums.strength()
    assert result is not None
    return result


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("size", [0.02, 0.3, 1.0])
def test_the_strength_is_the_true_one(size: float, strength: float) -> None:
    assert measured(size, strength)[0] == pytest.approx(strength, abs=1e-9)
    assert measured(size, strength, share=0.9)[0] == pytest.approx(strength, abs=1e-9), "the scale is another thing"
    value, deviation = measured(size, strength, step=0.3, share=0.97)
    assert abs(value - strength) < 4 * deviation + 1e-6
    assert deviation < 0.05
