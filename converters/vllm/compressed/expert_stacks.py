"""Experts that lie in one 3-D tensor a layer, as single weights: vLLM reads quantized experts one by one.

Names and layout of each are llm-compressor's (``modeling/moe/linear_experts.py``), which vLLM's classes read:
``...experts.3.gate_proj``, ``up_proj`` and ``down_proj``, each (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class Family:
    """Where the experts of a model type lie, gate before up, and whether as (experts, in, out).

    ``transposed`` None: files of both kinds are there, and the shape of the one with gate and up says which this is.
    """

    transposed: bool | None
    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"


_GRANITE = Family(False, "input_linear.weight", "output_linear.weight")
# model_type of the text part -> its experts, as its files have them
FAMILIES: Mapping[str, Family] = {
    "llama4_text": Family(transposed=True),
    "qwen3_vl_moe_text": Family(transposed=None),  # turned round by transformers 5 when it saves
    "qwen3_5_moe_text": Family(transposed=False),
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
}


@dataclass(frozen=True)
class ExpertStack:
    """One 3-D tensor, and the weights in it: ``parts`` of each expert, which follow one another in ``out``."""

    spec: TensorSpec
    owner: str  # the module of the experts, with a dot behind it
    parts: tuple[str, ...]
    transposed: bool

    def weights(self, rows: slice | None = None) -> Iterator[tuple[TensorSpec, ...]]:
        """The weights of each expert, or of those in ``rows``."""
        rows = rows or slice(0, self.spec.rows)
        out, into = self.spec.shape[:0:-1] if self.transposed else self.spec.shape[1:]
        for number in range(rows.start, rows.stop):
            names = [f"{self.owner}{number}.{part}.weight" for part in self.parts]
            yield tuple(TensorSpec(name, (out // len(names), into), self.spec.dtype) for name in names)

    def take_apart(self, rows: slice, values: Tensor) -> Iterator[list[tuple[TensorSpec, Tensor]]]:
        """Each of the experts ``rows`` as its weights, with their values."""
        for expert, weights in zip(values, self.weights(rows), strict=True):
            own = expert.T if self.transposed else expert
            yield [(weight, part.contiguous()) for weight, part in zip(weights, own.chunk(len(weights)), strict=True)]

    def join(self, experts: Sequence[Sequence[Tensor]]) -> Tensor:
        """The whole weights of some experts as the rows of the tensor that they are."""
        import torch

        joined = torch.stack([torch.cat(list(weights)) for weights in experts])
        return joined.transpose(1, 2).contiguous() if self.transposed else joined


def find_stacks(specs: Sequence[TensorSpec], config: JsonObject) -> dict[str, ExpertStack]:
    """Stored name -> the experts in it, of those 3-D tensors that are known to hold some.

    ``config`` is that of the text part. Shapes that are not those of the type are left out.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return {}
    hidden, found = config.get("hidden_size"), {}
    pairs = {spec.name.removesuffix(family.gate_up): spec for spec in specs if spec.name.endswith(f".{family.gate_up}")}
    downs = {spec.name.removesuffix(family.down): spec for spec in specs if spec.name.endswith(f".{family.down}")}
    for owner in pairs.keys() & downs.keys():
        pair, down = pairs[owner].shape, downs[owner].shape
        transposed = pair[1] == hidden if family.transposed is None else family.transposed
        if transposed:
            pair, down = (pair[0], *pair[:0:-1]), (down[0], *down[:0:-1])
        unclear = family.transposed is None and pair[1] == pair[2]
        if unclear or (pair[2], down[1], pair[1]) != (hidden, hidden, 2 * down[2]):
            continue
        for spec, parts in ((pairs[owner], GATE_UP), (downs[owner], DOWN)):
            found[spec.name] = ExpertStack(spec, f"{owner}experts.", parts, transposed)
    return found
