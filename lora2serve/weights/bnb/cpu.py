"""bitsandbytes models on a CPU, made to compute what they would on a GPU."""

from __future__ import annotations

from typing import Any


def use_plain_cpu_kernels(model: Any) -> Any:
    """Keep bitsandbytes 0.50 from repacking 4-bit weights for AVX512-BF16 on the first forward in eval mode.

    The repacked layer computes in bfloat16 whatever was requested, and once repacked it stays so: a training step
    after an evaluation then runs through a kernel without a backward, and the gradients are silently wrong
    (``Linear4bit.forward`` in ``bitsandbytes/nn/modules.py``).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
