"""Weights without values: a model on the meta device becomes one of fake tensors, as bitsandbytes would hold it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import BLOCK, STATE_BLOCK
from lora2serve.training.expert_layers import compute_in_four_bits, quantizable

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
        quantizes = getattr(model, "is_loaded_in_4bit", False)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if packed and name == "weight":
                module._parameters[name] = _packed(
                    module.out_features, module.in_features, dtype, settings.double_quant
                )
            elif quantizes and quantizable(module, name):
                _pack_experts(module, name, dtype, settings.double_quant)
            else:
                wide = settings.kept_bytes == 4 and parameter.is_floating_point()
                kept = torch.float32 if wide else parameter.dtype
                module._parameters[name] = Parameter(torch.empty(parameter.shape, dtype=kept), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()


def _pack_experts(module: torch.nn.Module, name: str, dtype: torch.dtype, double_quant: bool) -> None:
    """4-bit weights, with their state, for those of the experts of a layer."""
    from bitsandbytes.functional import QuantState

    shape = module.get_parameter(name).shape
    experts, each = shape[0], prod(shape[1:])
    blocks, nested = each // BLOCK, None
    if double_quant:
        scales = torch.empty(experts, -(-blocks // STATE_BLOCK))
        nested = QuantState(absmax=scales, code=torch.empty(256), blocksize=STATE_BLOCK, dtype=torch.float32)
    state = QuantState(
        absmax=torch.empty(experts, blocks, dtype=torch.uint8 if nested else torch.float32), shape=shape,
        code=torch.empty(16), blocksize=BLOCK, quant_type="nf4", dtype=dtype,
        offset=torch.empty(experts) if nested else None, state2=nested,
    )  # fmt: skip
    codes = Parameter(torch.empty(experts, each // 2, dtype=torch.uint8), requires_grad=False)
    setattr(codes, "quant_state", state)  # noqa: B010
    compute_in_four_bits(module, name, codes, state)


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
