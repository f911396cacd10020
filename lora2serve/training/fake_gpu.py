"""What a CPU would do otherwise than a GPU, replaced for a run on fake tensors; in a process of its own, for good."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora2serve.planning.plan_settings import PlanSettings


def install(settings: PlanSettings) -> None:
    """Let libraries take the ways that they take with ``settings``."""
    from peft.tuners.lora import dora
    from transformers import masking_utils
    from trl.kernels import chunked_logprob

    dora.deepcopy = lambda module: module  # a copy of a fake tensor is one of another world
    dora.dequantize_module_weight = _dequantized  # by the class of a weight, which a fake one has not
    # everything is where it belongs, and fake parameters cannot be exchanged
    setattr(torch.nn.Module, "to", _stay)  # noqa: B010
    masking_utils.find_packed_sequence_indices = lambda _: None  # otherwise it looks at values, which are not there
    if settings.on_cpu:
        return
    torch.is_autocast_enabled = _autocast_enabled(torch.is_autocast_enabled)
    setattr(torch.nn.functional, "dropout", _dropout)  # noqa: B010 - a CPU's mask is as wide as its values
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):  # Triton's kernels work in place
        setattr(chunked_logprob, name, lambda *_, **__: None)


def _dequantized(module: torch.nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = module.weight
    assert isinstance(weight, Tensor)
    state = getattr(weight, "quant_state", None)
    unpacked = weight if state is None else dequantize_4bit(weight.data, state)
    assert isinstance(unpacked, Tensor)
    return unpacked


def _stay(module: torch.nn.Module, *_: object, **__: object) -> torch.nn.Module:
    return module


def _autocast_enabled(own: Callable[[str], bool]) -> Callable[..., bool]:
    """PEFT asks without a device, which means CUDA."""
    return lambda device="cpu": own("cpu")


def _dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(values, p, True)[0] if training and p else values
