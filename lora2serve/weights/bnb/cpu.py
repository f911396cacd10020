"""bitsandbytes models on a CPU, made to compute what they would on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.library import Library

LIBRARY, DEQUANTIZE = "bitsandbytes", "dequantize_4bit"


def use_plain_cpu_kernels(model: Any) -> Any:
    """Keep bitsandbytes 0.50 from repacking 4-bit weights for AVX512-BF16 on the first forward in eval mode.

    The repacked layer computes in bfloat16 whatever was requested, and once repacked it stays so: a training step
    after an evaluation then runs through a kernel without a backward, and the gradients are silently wrong
    (``Linear4bit.forward`` in ``bitsandbytes/nn/modules.py``). What its other kernel gets wrong is mended, too.
    """
    import bitsandbytes as bnb

    count_blocks_over_rows()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@cache
def count_blocks_over_rows() -> Library:
    """Let bitsandbytes 0.50 dequantize on a CPU what its quantizer has made, whatever the length of a row.

    Its kernel begins to count blocks anew in each row: with rows of 96 values, which no number of 64 fills, it takes
    the scales of other blocks, and with rows of 16 one scale for all of them. Quantizer and CUDA count from the start
    of the weight. Returned is what keeps it so in this process.
    """
    import torch

    own = torch.library.get_kernel(f"{LIBRARY}::{DEQUANTIZE}", "CPU")

    def dequantize(
        keys: torch.DispatchKeySet, codes: torch.Tensor, absmax: torch.Tensor, block: int, kind: str,
        shape: Sequence[int], dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        count, rows = prod(shape), shape
        if shape[-1] % block:
            rows = (count // block, block) if count % block == 0 else (1, count)
        values: torch.Tensor = own.call_boxed(keys, codes, absmax, block, kind, rows, dtype)
        return values.view(*shape)

    library = torch.library.Library(LIBRARY, "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there was one before
        library.impl(  # type: ignore[no-untyped-call]
            DEQUANTIZE, dequantize, "CPU", with_keyset=True, allow_override=True
        )
    return library
