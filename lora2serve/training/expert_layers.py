"""The experts of a layer in 4 bits, computed with as they are: dequantized for a product, and again for its gradient.

transformers keeps the weights of all experts of a layer in one tensor, (experts, out, in) or (experts, in, out). Each
expert is quantized by itself, as bitsandbytes quantizes a matrix, and all are dequantized at once. Between forward and
backward nothing is kept of them. A LoRA on them is two thin products beside, and never as large as a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Module, Parameter

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

BLOCK, STATE_BLOCK = 64, 256  # values that share a scale, and scales that share one
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")  # of a module that transformers lets be computed in several ways
MOST = (1 << 31) - BLOCK  # values that a kernel of bitsandbytes counts
ALIGNED = 8  # values of 16 bits that a kernel for grouped products reads at once
Lora = tuple[Tensor, Tensor, float]  # A (experts, rank, in), B (experts, out, rank), the scale of their product


@dataclass
class FourBitExperts:
    """Of one module of experts, whose parameters hold the codes: what is beside them, and the LoRAs of the moment."""

    count: int
    transposed: bool  # (experts, in, out)
    has_bias: bool
    first: str  # of its weights
    activate: Callable[[Tensor], Tensor]  # between the two
    states: dict[str, QuantState] = field(default_factory=dict)  # of each weight, by its name in the module
    dtype: torch.dtype | None = None  # to compute in; None: that of the weights
    loras: dict[str, list[Lora]] = field(default_factory=dict)

    def product(self, module: Module, name: str, states: Tensor, offsets: Tensor) -> Tensor:
        """(rows, out) of (rows, in) ``states``, whose rows are sorted by expert and end for each at ``offsets``."""
        codes, state = getattr(module, name), self.states[name]
        out: Tensor = _Product.apply(states, codes, state, offsets, self.transposed)  # type: ignore[no-untyped-call]
        for a, b, scale in self.loras.get(name, ()):
            narrow = _grouped(states, _even(a, 1).to(states.dtype).transpose(1, 2), offsets)
            out = out + scale * _grouped(narrow, _even(b, 2).to(states.dtype).transpose(1, 2), offsets)
        return out


def holds_experts(module: Module) -> bool:
    """Whether its forward is one that transformers lets be exchanged, over the weights of several experts."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "num_experts"))


def quantizable(module: Module, name: str) -> bool:
    """Whether that parameter holds experts that can be quantized each by itself."""
    weight = module._parameters.get(name)
    if weight is None or name not in WEIGHTS or not holds_experts(module):
        return False
    return weight.dim() == 3 and prod(weight.shape[1:]) % BLOCK == 0


def quantize_experts(
    weights: Tensor, quant_type: str, double: bool, storage: torch.dtype
) -> tuple[Params4bit, QuantState]:
    """The codes of (experts, a, b) ``weights``, a row of ``storage`` for each, and what is beside them."""
    from bitsandbytes.functional import QuantState, quantize_4bit
    from bitsandbytes.nn import Params4bit

    packed = [quantize_4bit(weight.contiguous(), None, None, BLOCK, double, quant_type, storage) for weight in weights]
    states = [state for _, state in packed]
    inner = [state.state2 for state in states if state.state2 is not None]
    nested = None
    if inner:
        scales = torch.stack([each.absmax for each in inner])
        nested = QuantState(absmax=scales, code=inner[0].code, blocksize=STATE_BLOCK, dtype=torch.float32)
    state = QuantState(
        absmax=torch.stack([each.absmax for each in states]), shape=weights.shape, code=states[0].code,
        blocksize=BLOCK, quant_type=quant_type, dtype=weights.dtype,
        offset=torch.stack([each.offset for each in states]) if inner else None, state2=nested,
    )  # fmt: skip
    codes = torch.stack([codes.flatten() for codes, _ in packed])
    return Params4bit(  # which other libraries leave as it is
        codes, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=double,
        quant_type=quant_type, quant_storage=storage, bnb_quantized=True,
    ), state  # fmt: skip


def compute_in_four_bits(module: Module, name: str, codes: Parameter, state: QuantState) -> None:
    """Let ``module`` compute with those codes where it had a weight."""
    if "four_bit" not in vars(module):
        gated = bool(getattr(module, "has_gate"))  # noqa: B009 - types of a module's attributes are not known
        vars(module)["four_bit"] = FourBitExperts(
            count=int(getattr(module, "num_experts")),  # noqa: B009
            transposed=bool(getattr(module, "is_transposed")),  # noqa: B009
            has_bias=bool(getattr(module, "has_bias")),  # noqa: B009
            first="gate_up_proj" if gated else "up_proj",
            activate=getattr(module, "_apply_gate" if gated else "act_fn"),
        )
        vars(module)["forward"] = MethodType(_forward, module)
    four_bit_of(module).states[name] = state
    module._parameters[name] = codes


def four_bit_of(module: Module) -> FourBitExperts:
    """What a module of 4-bit experts has beside its parameters."""
    found = vars(module)["four_bit"]
    assert isinstance(found, FourBitExperts)
    return found


def four_bit_modules(model: Module) -> Iterator[tuple[str, Module]]:
    """The modules of 4-bit experts, by name."""
    return ((name, module) for name, module in model.named_modules() if "four_bit" in vars(module))


def four_bit_parameters(model: Module) -> list[str]:
    """Dotted names of the weights of experts that are in 4 bits, as they are without an adapter around them."""
    return [f"{name}.{weight}" for name, module in four_bit_modules(model) for weight in four_bit_of(module).states]


def seen_absmax(state: QuantState) -> Tensor:
    """The scales as the dequantizer sees them: (experts, blocks) float32."""
    absmax: Tensor = state.absmax
    if state.state2 is None:
        return absmax
    scales = state.state2.absmax.repeat_interleave(STATE_BLOCK, 1)[:, : absmax.shape[1]]
    seen: Tensor = state.state2.code[absmax.int()] * scales + state.offset[:, None]
    return seen


def dequantize_experts(codes: Tensor, state: QuantState) -> Tensor:
    """The (experts, a, b) weights, in the type that they were loaded in."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    absmax, packed = seen_absmax(state), codes.detach().contiguous().view(torch.uint8)
    each = prod(state.shape[1:])
    at_once = max(1, MOST // each)
    parts = []
    for start in range(0, len(packed), at_once):
        part, count = packed[start : start + at_once], min(at_once, len(packed) - start)
        # A row a block: the kernel for CPUs counts blocks from the start of each row.
        own = QuantState(
            absmax=absmax[start : start + at_once].reshape(-1), shape=torch.Size((count * each // BLOCK, BLOCK)),
            blocksize=BLOCK, quant_type=state.quant_type, dtype=state.dtype,
        )  # fmt: skip
        parts.append(dequantize_4bit(part.reshape(-1, 1), own).view(count, *state.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Product(torch.autograd.Function):
    """Rows times the weights of their experts. The weights get no gradient, and are not kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, states: Tensor, codes: Tensor, state: QuantState, offsets: Tensor, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(codes, offsets)
        ctx.state, ctx.transposed = state, transposed  # type: ignore[attr-defined]
        weights = dequantize_experts(codes, state).to(states.dtype)
        return _grouped(states, weights if transposed else weights.transpose(1, 2), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
        weights = dequantize_experts(codes, ctx.state).to(gradients[0].dtype)  # type: ignore[attr-defined]
        back = weights.transpose(1, 2) if ctx.transposed else weights  # type: ignore[attr-defined]
        return _grouped(gradients[0].contiguous(), back, offsets), None, None, None, None


def _forward(module: Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the classes of transformers compute, for rows that are sorted by their experts."""
    four_bit, count = four_bit_of(module), top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(four_bit.count, device=experts.device)
    offsets = torch.searchsorted(experts, numbers.to(experts.dtype), right=True).to(torch.int32)
    dtype = four_bit.dtype or next(iter(four_bit.states.values())).dtype
    states = hidden_states.to(dtype)[order // count]
    states = four_bit.activate(_biased(module, four_bit.first, states, offsets, experts))
    states = _biased(module, "down_proj", states, offsets, experts)
    weighted = states * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    total: Tensor = weighted[back].view(len(hidden_states), count, -1).sum(1)
    return total.to(hidden_states.dtype)


def _biased(module: Module, name: str, states: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
    four_bit = four_bit_of(module)
    if name in four_bit.states:
        out = four_bit.product(module, name, states, offsets)
    else:  # its experts are no whole number of blocks
        weights = getattr(module, name).to(states.dtype)
        out = _grouped(states, weights if four_bit.transposed else weights.transpose(1, 2), offsets)
    if not four_bit.has_bias:
        return out
    bias: Tensor = getattr(module, f"{name}_bias")
    return out + bias[experts].to(out.dtype)


def _grouped(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """(rows, out): each group of ``rows``, which end at ``offsets``, by its own of (groups, in, out) ``weights``."""
    if _has_kernel(rows):
        return torch.nn.functional.grouped_mm(rows, weights, offs=offsets)
    ends = [0, *offsets.tolist()]
    return torch.cat([rows[first:last] @ weights[group] for group, (first, last) in enumerate(pairwise(ends))])


def _has_kernel(rows: Tensor) -> bool:
    """Whether torch multiplies groups at once there."""
    if rows.is_cuda:
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0)
    return True


def _even(factor: Tensor, rank: int) -> Tensor:
    """With zeros where the rank, on that axis, is no whole number of what a kernel reads at once."""
    more = -factor.shape[rank] % ALIGNED
    pads: Sequence[int] = (0, 0, 0, more) if rank == 1 else (0, more)
    return torch.nn.functional.pad(factor, pads) if more else factor.contiguous()
