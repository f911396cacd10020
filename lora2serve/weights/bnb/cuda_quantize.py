"""bitsandbytes' CUDA quantisers in torch: the codes that a GPU gave to weights, found again without one.

Its CPU quantisers are no stand-in: they put a value at the border of two codes on the other side (fp4), and small
values of a scale into a neighbour's code (8 bits). Borders and ties as in ``csrc/cuda/blockwise_quantization.cu`` of
bitsandbytes 0.50: dQuantizeNF4, dQuantizeFP4, dQuantize<0>.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NF4_BORDERS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip
FP4_BORDERS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)  # of magnitudes
FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)  # by magnitude; the fourth bit is the sign

# The kernels are built with --use_fast_math, so that 1/x is rcp.approx.ftz.f32: not the nearest float32 for these
# ten-bit mantissas of x, read off an H100 (all others of float16 and bfloat16 are). It decides ties of fp4.
ONE_ULP_LESS = (
    6, 14, 32, 46, 62, 70, 77, 86, 87, 88, 126, 127, 135, 160, 176, 179, 214, 219, 221, 274, 287, 325, 349, 401, 415,
    443, 445, 473, 474, 558, 614, 751, 783, 950, 954, 956, 957, 965, 1010, 1016,
)  # fmt: skip
ONE_ULP_MORE = (
    11, 17, 18, 20, 48, 91, 97, 98, 104, 105, 113, 138, 147, 148, 153, 203, 204, 209, 225, 226, 252, 260, 296, 298, 304,
    305, 346, 371, 386, 395, 396, 403, 408, 409, 417, 425, 439, 449, 453, 454, 458, 467, 481, 488, 498, 505, 507, 519,
    520, 521, 528, 531, 543, 547, 563, 564, 627, 647, 648, 650, 651, 667, 675, 676, 687, 700, 701, 724, 728, 785, 786,
    787, 789, 805, 807, 813, 823, 872, 874, 876, 878, 893, 920, 923, 928, 944, 968, 987, 988, 997,
)  # fmt: skip


def four_bit(values: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """``nf4`` or ``fp4`` codes, one uint8 a value, and float32 (blocks,) absmax, of ``values`` in their flat order.

    Bit-equal to the kernel for float16 and bfloat16; a float32 value that lies on a border to its last bit may get the
    code beside it.
    """
    import torch

    blocks = _blocks(values, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * _approximate_reciprocal(absmax)[:, None]).flatten()[: values.numel()]
    if kind == "nf4":
        return torch.bucketize(scaled, torch.tensor(NF4_BORDERS), out_int32=True).to(torch.uint8), absmax
    steps = torch.bucketize(scaled.abs(), torch.tensor(FP4_BORDERS), out_int32=True)
    codes = torch.tensor(FP4_CODES, dtype=torch.uint8).index_select(0, steps)
    return codes + 8 * (scaled < 0).to(torch.uint8), absmax


def eight_bit(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Values of bitsandbytes' dynamic map nearest to the (n,) float32 ``values``, a tie going to the even code.

    Codes as uint8 (n,), and float32 (blocks,) absmax.
    """
    import torch

    known = dynamic_map()
    blocks = _blocks(values, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * absmax.reciprocal()[:, None]).flatten()[: values.numel()]
    borders = (known[:-1] + known[1:]) * 0.5
    borders[1::2] = torch.nextafter(borders[1::2], torch.tensor(-2.0))  # between an odd code and the even one above it
    return torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8), absmax


def dynamic_map() -> Tensor:
    """The 256 values of the 8-bit code, ascending, float32 (https://arxiv.org/abs/2110.02861)."""
    from bitsandbytes.functional import create_dynamic_map

    found: Tensor = create_dynamic_map().float()
    return found


def _blocks(values: Tensor, block: int) -> Tensor:
    """(blocks, block) float32, the last one filled up with zeros."""
    import torch

    flat = values.flatten().float()
    return torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)


def _approximate_reciprocal(absmax: Tensor) -> Tensor:
    """1/x as the GPU has it, for float32 ``absmax`` that are values of float16 or bfloat16."""
    import torch

    ulps = torch.zeros(1024, dtype=torch.int32)
    ulps[list(ONE_ULP_LESS)], ulps[list(ONE_ULP_MORE)] = -1, 1
    bits = absmax.view(torch.int32)
    known = bits & 0x1FFF == 0  # no more than ten bits of mantissa
    off = ulps.index_select(0, bits >> 13 & 1023) * known
    return (absmax.reciprocal().view(torch.int32) + off).view(torch.float32)
