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


def four_bit(values: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """``nf4`` or ``fp4`` codes, one uint8 a value, and float32 (blocks,) absmax, of ``values`` in their flat order."""
    import torch

    scaled, absmax = _scaled(values, block)
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
    scaled, absmax = _scaled(values, block)
    borders = (known[:-1] + known[1:]) * 0.5
    borders[1::2] = torch.nextafter(borders[1::2], torch.tensor(-2.0))  # between an odd code and the even one above it
    return torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8), absmax


def dynamic_map() -> Tensor:
    """The 256 values of the 8-bit code, ascending, float32 (https://arxiv.org/abs/2110.02861)."""
    from bitsandbytes.functional import create_dynamic_map

    found: Tensor = create_dynamic_map().float()
    return found


def _scaled(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Each value over its block's absmax, as the kernel computes it: times the float32 reciprocal."""
    import torch

    flat = values.flatten().float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    scaled = padded * absmax.reciprocal()[:, None]
    return scaled.flatten()[: len(flat)], absmax
