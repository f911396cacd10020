"""PEFT's LoRA on the weights of experts (``target_parameters``) where these are in 4 bits.

PEFT adds the product of A and B to the weight, which is not there: here the products go beside it. Names, factors and
files are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MethodType

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.nn import Module, Parameter

from lora2serve.training.expert_layers import Lora, four_bit_modules, four_bit_of


@contextmanager
def open_to_peft(model: Module) -> Iterator[None]:
    """Meanwhile PEFT sees the shapes of the weights, as it puts an adapter on them."""
    experts = [module for _, module in four_bit_modules(model)]
    packed = [{name: module._parameters[name] for name in four_bit_of(module).states} for module in experts]
    for module in experts:
        for name, state in four_bit_of(module).states.items():
            one = torch.empty(1, dtype=state.dtype, device=state.code.device)
            module._parameters[name] = Parameter(one.expand(state.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, codes in zip(experts, packed, strict=True):
            module._parameters.update(codes)
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper) and "four_bit" in vars(wrapper.get_base_layer()):
            vars(wrapper)["_activate_lora"] = MethodType(_activate, wrapper)


def _activate(wrapper: ParamWrapper, active: Sequence[str]) -> AbstractContextManager[None]:
    return _beside(wrapper, [_factors(wrapper, name) for name in active if name in wrapper.lora_A])


@contextmanager
def _beside(wrapper: ParamWrapper, loras: list[Lora]) -> Iterator[None]:
    """For one forward of the experts, which run inside of it."""
    known = four_bit_of(wrapper.get_base_layer()).loras
    known[wrapper.parameter_name] = loras
    try:
        yield
    finally:
        del known[wrapper.parameter_name]


def _factors(wrapper: ParamWrapper, adapter: str) -> Lora:
    """A holds the experts' ranks one after another, (experts * rank, in); B interleaves them, (out, rank * experts)."""
    a, b, count = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight, wrapper.num_experts
    of_each = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    return a.reshape(count, -1, a.shape[1]), of_each, float(wrapper.scaling[adapter])
