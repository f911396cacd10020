"""Rows of a weight in float32 to codes and scales: symmetric, nearest value, by the scale that is stored.

A scale is the largest absolute value of what shares it over the largest code: 448 in fp8, half of 2^n - 1 in integers
of n bits, 6 in fp4 (E2M1). nvfp4 keeps its scales in fp8, stretched over that type's range by one factor for all
weights that are fused. mxfp4's are powers of two (OCP Microscaling Formats 1.0), the next one up from a significand of
1.75.
A test holds every scheme against what compressed-tensors 0.17 computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.vllm.compressed.schemes import Scheme
from lora2serve.weights.tensors import DType, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0
EPS = 2.0**-23  # the scale of rows of zeros
SMALLEST_FP8_SCALE = 0.125  # and that of a group of zeros in nvfp4
# Half way between 0, 0.5, 1, 1.5, 2, 3, 4 and 6. Ties go to the even code: down, up (so the largest float32 below),
# and so on.
FP4_BOUNDS = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)


def quantize(values: Tensor, scheme: Scheme, scale_dtype: DType, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The stored weight and its scales: (rows, in) -> (rows, ...), (rows or blocks of them, ...).

    ``factor`` is the scale over whole tensors, where the scheme has one.
    """
    tiles = _tiles(values.float(), scheme)
    scales, divisor = _scales(_peaks(tiles, scheme), scheme, scale_dtype, factor)
    scaled = tiles / (divisor[:, None, :, None] if scheme.group else divisor)
    if scheme.kind == "float" and scheme.bits == 4:
        return _pack_fp4(scaled.flatten(1)), scales
    codes = _round(scaled, scheme)
    if scheme.group:
        codes = codes.view(codes.shape[0] * scheme.rows, -1)[: values.shape[0], : values.shape[1]]
    return (_pack_integers(codes, scheme.bits) if scheme.packed else codes), scales


def global_factor(peak: float) -> Tensor:
    """(1,) float32: what stretches nvfp4's scales over the range of fp8, from the largest absolute value."""
    import torch

    factor = FP8_MAX * FP4_MAX / torch.tensor([peak]).clamp(min=torch.finfo(torch.float32).tiny)
    return factor.nan_to_num(nan=1.0, posinf=1.0)


def _tiles(weight: Tensor, scheme: Scheme) -> Tensor:
    """(rows, in) where a row has one scale, else (blocks of rows, rows, groups, columns), padded with zeros."""
    import torch

    if not scheme.group:
        return weight
    if scheme.rows > 1:
        rows, columns = weight.shape
        weight = torch.nn.functional.pad(weight, (0, -columns % scheme.group, 0, -rows % scheme.rows))
    return weight.view(len(weight) // scheme.rows, scheme.rows, -1, scheme.group)


def _peaks(tiles: Tensor, scheme: Scheme) -> Tensor:
    """The largest absolute value of what shares a scale: (rows, 1), (rows, groups) or (blocks, blocks)."""
    import torch

    if not scheme.group:
        low, high = torch.aminmax(tiles, dim=1, keepdim=True)
        return torch.maximum(-low, high)
    return torch.maximum(-tiles.amin((1, 3)), tiles.amax((1, 3)))


def _scales(peaks: Tensor, scheme: Scheme, dtype: DType, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scales as they are stored, and what the weight is divided by."""
    import torch

    if scheme.scale == "U8":  # the exponent, with a bias of 127
        exponents = ((peaks.abs().view(torch.int32) + (1 << 21)) >> 23).sub_(2).clamp_(0, 255)
        return exponents.to(torch.uint8), 2.0 ** (exponents - 127).float()
    largest = FP4_MAX if scheme.bits == 4 else FP8_MAX
    scales = peaks / (largest if scheme.kind == "float" else (2**scheme.bits - 1) / 2)
    if factor is not None:
        stored = (factor * scales).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn)
        scales = stored.float()
        scales[scales == 0] = SMALLEST_FP8_SCALE
        return scales.to(stored.dtype), scales / factor
    scales[scales == 0] = EPS
    stored = scales.to(torch_dtype(dtype))
    stored[stored == 0] = torch.finfo(stored.dtype).tiny  # too small for the type: such rows become zero
    return stored, stored


def _round(scaled: Tensor, scheme: Scheme) -> Tensor:
    """The nearest codes in fp8 or int8."""
    import torch

    if scheme.kind == "float":
        return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    half = 2 ** (scheme.bits - 1)
    return scaled.clamp_(-half, half - 1).round_().to(torch.int8)


def _pack_integers(codes: Tensor, bits: int) -> Tensor:
    """Codes in 32-bit words, the first one lowest, with half of their range added."""
    import torch

    unsigned: Tensor = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def _pack_fp4(scaled: Tensor) -> Tensor:
    """Two values of E2M1 in a byte, the first one low."""
    import torch

    codes = (scaled < 0).to(torch.uint8) << 3
    scaled.abs_()
    for bound in FP4_BOUNDS:
        codes += scaled > bound
    packed: Tensor = codes[:, ::2] | codes[:, 1::2] << 4
    return packed
