"""bitsandbytes' CUDA quantizers without a GPU; tests/gpu/test_dequantize.py asks the kernels themselves."""

from __future__ import annotations

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit, quantize_blockwise
from hypothesis import given
from hypothesis import strategies as st

from lora2serve.weights.bnb import cuda_quantize
from lora2serve.weights.dequantize import nibbles


@given(st.integers(0, 2**32 - 1), st.sampled_from([(64, 64), (9, 96), (71, 13)]))
def test_codes_of_weights_are_those_of_the_cpu(seed: int, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()
    codes, absmax = cuda_quantize.nf4(weight, 64)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(codes.int(), nibbles(packed.flatten())[: weight.numel()].int())


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
    """The control: why bitsandbytes' own CPU quantizer is no stand-in."""
    torch.manual_seed(0)
    scales = (torch.randn(1 << 16, 64) * 0.02).bfloat16().float().abs().amax(1)
    scales -= scales.mean()
    assert not torch.equal(cuda_quantize.eight_bit(scales, 256)[0], quantize_blockwise(scales, blocksize=256)[0])


def test_a_block_of_zeros_stays_zero() -> None:
    codes, absmax = cuda_quantize.nf4(torch.zeros(64), 64)
    known = get_4bit_type("nf4", device="cpu")
    assert not (known[codes.long()] * absmax).any()
    codes, absmax = cuda_quantize.eight_bit(torch.zeros(8), 256)
    assert not (cuda_quantize.dynamic_map()[codes.long()] * absmax).any()
