"""bitsandbytes' CUDA quantizers in torch: the codes that a GPU gave to weights, computed again without one.

Its CPU quantizers are no stand-in: they put small values of a scale into a neighbor's code (8 bits). Borders and ties
as in ``csrc/cuda/blockwise_quantization.cu`` of bitsandbytes 0.50: dQuantizeNF4, dQuantize<0>.
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


def nf4(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes, one uint8 a value, and float32 (blocks,) absmax, of ``values`` in their flat order.

    Bit-equal to the kernel for float16 and bfloat16 (all ratios of them were compared), though its reciprocal of the
    absmax is an approximate one. A float32 value that lies on a border to its last bit may get the code beside it.
    """
    import torch

    blocks = _blocks(values, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * absmax.reciprocal()[:, None]).flatten()[: values.numel()]
    return torch.bucketize(scaled, torch.tensor(NF4_BORDERS), out_int32=True).to(torch.uint8), absmax


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

    values: Tensor = create_dynamic_map().float()
    return values


def _blocks(values: Tensor, block: int) -> Tensor:
    """(blocks, block) float32, the last one filled up with zeros."""
    import torch

    flat = values.flatten().float()
    return torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
