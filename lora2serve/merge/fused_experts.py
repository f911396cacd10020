"""LoRA on single experts of a base that stores them fused, all of a layer in one 3-D weight (gpt-oss, Llama 4).

Tools that take the experts apart for training (Unsloth, llm-compressor) give each its own module:
``experts.3.gate_proj``, ``experts.3.gate_up_proj`` or ``experts.gate_up_projs.3``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora2serve.adapters.deltas import AdapterTensor, Lora
from lora2serve.errors import MergeError
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = re.compile(r"(?P<owner>.*experts)\.(?:(?P<n>\d+)\.(?P<part>\w+)|(?P<parts>\w+?)s?\.(?P<m>\d+))\.weight")
HALVES = {"gate_proj": 0, "up_proj": 1, "w1": 0, "w3": 1}
FUSED = "gate_up_proj"


@dataclass(frozen=True)
class Layout:
    """How a fused weight lies: (experts, in, out) where ``transposed``, gate and up one after another or in turns."""

    transposed: bool | None  # None: nobody says
    interleaved: bool


@dataclass(frozen=True)
class OneExpertLora:
    """``scale * B @ A`` on those ``outputs`` of one expert in a fused weight."""

    a: AdapterTensor  # (r, in)
    b: AdapterTensor  # (out, r)
    scale: float
    expert: int
    transposed: bool
    outputs: slice
    whole: ClassVar[bool] = False

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        out, into = self.b.shape[0], self.a.shape[-1]
        own = before[1:] if not self.transposed else before[:0:-1]
        selected = len(range(*self.outputs.indices(own[0]))) if len(before) == 3 else 0
        if len(before) != 3 or self.expert >= before[0] or (selected, own[1]) != (out, into):
            raise ValueError(f"the adapter is for [{out}, {into}] of expert {self.expert}, the base has {list(before)}")
        return before

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        if not rows.start <= self.expert < rows.stop:
            return weight
        merged = weight.clone()
        own = merged[self.expert - rows.start]
        own = own.T if self.transposed else own  # a view: (out, in)
        own[self.outputs] += (self.b.read() @ self.a.read()).mul_(self.scale)
        return merged


def find_fused(
    match: re.Match[str], delta: Lora, stored: Callable[[str], TensorSpec | None], layout: Layout
) -> tuple[str, OneExpertLora] | None:
    """The fused weight that one expert's LoRA lies in; None where nothing is fused. ``match``: of ``EXPERT``.

    MergeError where it cannot be placed.
    """
    owner, part, number = match["owner"], match["part"] or match["parts"], int(match["n"] or match["m"])
    half = None
    fused = stored(f"{owner}.{part}")
    if fused is None and part in HALVES:
        fused, half = stored(f"{owner}.{FUSED}"), HALVES[part]
    if fused is None or len(fused.shape) != 3:
        return None
    if delta.magnitude is not None:
        raise MergeError(f"{match[0]}: DoRA on one of the experts that lie in {fused.name}", "train LoRA without it")
    transposed = _transposed(fused, delta, half is not None, layout)
    out = fused.shape[2 if transposed else 1]
    return fused.name, OneExpertLora(delta.a, delta.b, delta.scale, number, transposed, _outputs(half, out, layout))


def _transposed(spec: TensorSpec, delta: Lora, halved: bool, layout: Layout) -> bool:
    """As the shapes say; where both fit, as transformers' own module does."""
    wanted = (delta.b.shape[0] * (2 if halved else 1), delta.a.shape[-1])
    fits, fits_transposed = spec.shape[1:] == wanted, spec.shape[1:] == wanted[::-1]
    if fits != fits_transposed:
        return fits_transposed
    if fits and layout.transposed is None:
        raise MergeError(f"{spec.name}: square, and nothing says whether it lies transposed", "merge with PEFT instead")
    return bool(layout.transposed)


def _outputs(half: int | None, out: int, layout: Layout) -> slice:
    if half is None:
        return slice(None)
    return slice(half, None, 2) if layout.interleaved else slice(half * out // 2, (half + 1) * out // 2)
