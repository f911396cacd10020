"""An adapter that is kept in float32 and computed with in 16 bits: cast once a batch and all at once, not at each use.

Autocast casts each matrix where it is used, again where a layer is computed twice, and each gradient back: thousands of
small kernels a step. The values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Linear

if TYPE_CHECKING:
    from peft import PeftModel


class AdapterCasts:
    """``on`` lets the LoRAs of ``model`` be computed with in ``dtype``, and their float32 weights get the gradients."""

    def __init__(self, model: PeftModel, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._linears = [
            module
            for name, module in model.named_modules()
            if isinstance(module, Linear) and {"lora_A", "lora_B"} & set(name.split("."))
        ]
        if any(getattr(config, "use_dora", False) for config in model.peft_config.values()):
            self._linears = []  # its norms are of the weights in float32

    @contextmanager
    def on(self) -> Iterator[None]:
        """For the forward and the backward of one batch."""
        weights = [linear.weight for linear in self._linears]
        casts = _CastAll.apply(self._dtype, *weights) if weights else ()  # type: ignore[no-untyped-call]
        for linear, cast in zip(self._linears, casts, strict=True):
            vars(linear)["weight"] = cast  # before the parameter of that name, which saving and AdamW go on with
        try:
            yield
        finally:
            for linear in self._linears:
                vars(linear).pop("weight", None)


class _CastAll(torch.autograd.Function):
    """All in one kernel, or a few."""

    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, list(weights))
        return tuple(casts)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(wide, list(gradients))
        return (None, *wide)
