"""bitsandbytes' CUDA quantisers without a GPU; tests/gpu/test_dequantize.py asks the kernels themselves."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit, quantize_blockwise
from hypothesis import given
from hypothesis import strategies as st

from lora2serve.weights.bnb import cuda_quantize
from lora2serve.weights.dequantize import nibbles

# type, value, absmax -> the code of an H100's fp4 kernel: ratios on the border of two codes
SEEN = [
    (torch.bfloat16, 0.859375, 1.03125, 2),
    (torch.bfloat16, 0.30078125, 1.03125, 7),
    (torch.bfloat16, 0.21484375, 1.03125, 6),
    (torch.bfloat16, -0.859375, 1.03125, 10),
    (torch.bfloat16, -0.30078125, 1.03125, 15),
    (torch.bfloat16, -0.21484375, 1.03125, 14),
    (torch.bfloat16, 0.91796875, 1.1015625, 3),
    (torch.bfloat16, 0.2294921875, 1.1015625, 7),
    (torch.bfloat16, 0.9765625, 1.171875, 2),
    (torch.bfloat16, 0.341796875, 1.171875, 7),
    (torch.float16, 0.84228515625, 1.0107421875, 3),
    (torch.float16, 0.2105712890625, 1.0107421875, 7),
    (torch.float16, 0.8447265625, 1.013671875, 2),
    (torch.float16, 0.295654296875, 1.013671875, 7),
    (torch.float16, 0.211181640625, 1.013671875, 6),
    (torch.float16, -0.84716796875, 1.0166015625, 11),
    (torch.float16, 0.2117919921875, 1.0166015625, 7),
]


@pytest.mark.parametrize(("dtype", "value", "absmax", "code"), SEEN)
def test_ties_of_fp4_as_a_gpu_decides_them(dtype: torch.dtype, value: float, absmax: float, code: int) -> None:
    for power in (0, -5):  # the exponent does not matter
        block = torch.tensor([absmax, value, 0.0, 0.0]).to(dtype) * 2.0**power
        codes, scales = cuda_quantize.four_bit(block, "fp4", 64)
        assert scales.tolist() == [absmax * 2.0**power]
        assert codes[1] == code


def test_a_correctly_rounded_reciprocal_decides_some_of_them_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the table."""
    monkeypatch.setattr(cuda_quantize, "_approximate_reciprocal", torch.Tensor.reciprocal)
    with pytest.raises(AssertionError):
        for case in SEEN:
            test_ties_of_fp4_as_a_gpu_decides_them(*case)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(64, 64), (9, 96), (71, 13)]))
def test_codes_are_those_of_the_cpu_but_for_borders(seed: int, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()
    for kind in ("nf4", "fp4"):
        codes, absmax = cuda_quantize.four_bit(weight, kind, 64)
        packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=False)
        assert torch.equal(absmax, state.absmax)
        theirs = nibbles(packed.flatten())[: weight.numel()]
        other = codes != theirs
        assert other.float().mean() < (0.03 if kind == "fp4" else 1e-9)
        known = get_4bit_type(kind, device="cpu")
        scale = absmax.repeat_interleave(64)[: weight.numel()]
        ratio = weight.flatten().float() / scale
        ours, cpus = known[codes.long()], known[theirs.long()]
        assert torch.allclose((ours - ratio).abs()[other], (cpus - ratio).abs()[other], atol=1e-6), "as near"


def test_scales_go_to_the_nearest_value_and_a_tie_to_the_even_code() -> None:
    known = cuda_quantize.dynamic_map()
    assert len(known) == 256
    assert bool((known[1:] > known[:-1]).all())
    borders = (known[1:] + known[:-1]) * 0.5
    below, above = (torch.nextafter(borders, torch.tensor(side)) for side in (-2.0, 2.0))
    lower = torch.arange(255)
    one = torch.ones(1)  # the absmax: the values stand as they are
    for values, expected in ((below, lower), (above, lower + 1), (borders, lower + lower % 2), (known, range(256))):
        codes, absmax = cuda_quantize.eight_bit(torch.cat([values, one]), 4096)
        assert absmax.tolist() == [1.0]
        assert codes[:-1].tolist() == list(expected)


def test_the_scales_of_a_cpu_are_others() -> None:
    """The control: why bitsandbytes' own CPU quantiser is no stand-in."""
    torch.manual_seed(0)
    scales = (torch.randn(1 << 16, 64) * 0.02).bfloat16().float().abs().amax(1)
    scales -= scales.mean()
    assert not torch.equal(cuda_quantize.eight_bit(scales, 256)[0], quantize_blockwise(scales, blocksize=256)[0])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_block_of_zeros_stays_zero(kind: str) -> None:
    codes, absmax = cuda_quantize.four_bit(torch.zeros(64), kind, 64)
    known = get_4bit_type(kind, device="cpu")
    assert not (known[codes.long()] * absmax).any()
    codes, absmax = cuda_quantize.eight_bit(torch.zeros(8), 256)
    assert not (cuda_quantize.dynamic_map()[codes.long()] * absmax).any()
