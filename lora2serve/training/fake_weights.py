"""Weights without values: a model on the meta device becomes one of fake tensors, as bitsandbytes would hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import BLOCK, STATE_BLOCK

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import BitsAndBytesConfig, PreTrainedModel


def quantize(model: PreTrainedModel, config: BitsAndBytesConfig) -> PreTrainedModel:
    """With the linear layers that transformers would have bitsandbytes quantize replaced, by transformers itself."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def materialize(model: PreTrainedModel, settings: PlanSettings) -> None:
    """Give every parameter and buffer a fake tensor, in the mode that is on; what is shared stays shared."""
    import bitsandbytes

    dtype = getattr(torch, settings.dtype)
    for module in model.modules():
        packed = isinstance(module, bitsandbytes.nn.Linear4bit)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if packed and name == "weight":
                module._parameters[name] = _packed(
                    module.out_features, module.in_features, dtype, settings.double_quant
                )
            else:
                wide = settings.kept_bytes == 4 and parameter.is_floating_point()
                kept = torch.float32 if wide else parameter.dtype
                module._parameters[name] = Parameter(torch.empty(parameter.shape, dtype=kept), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()


def _packed(outputs: int, inputs: int, dtype: torch.dtype, double_quant: bool) -> Parameter:
    """A 4-bit weight with its state."""
    from bitsandbytes.functional import QuantState

    numel = outputs * inputs
    weight = Parameter(torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    nested: QuantState | None = None
    blocks = -(-numel // BLOCK)
    if double_quant:
        scales = torch.empty(-(-blocks // STATE_BLOCK))
        nested = QuantState(absmax=scales, code=torch.empty(256), blocksize=STATE_BLOCK, dtype=torch.float32)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.float32 if nested is None else torch.uint8),
        shape=torch.Size((outputs, inputs)), code=torch.empty(16), blocksize=BLOCK, quant_type="nf4", dtype=dtype,
        offset=None if nested is None else torch.empty(()), state2=nested,
    )  # fmt: skip
    for name, value in (("quant_state", state), ("quant_type", "nf4"), ("compress_statistics", nested is not None),
                        ("quant_storage", torch.uint8), ("blocksize", BLOCK), ("bnb_quantized", True)):  # fmt: skip
        setattr(weight, name, value)
    return weight
