"""The plainest form of a LoRA, without loss: one rank from the engine's list, one alpha, no rsLoRA, no patterns.

Tensors keep their values and type; ranks grow by zeros. Only where modules differ in scale is the odd one's
B multiplied: in its own type where the ratio is a power of two (exact), else in float32.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora2serve.adapters.adapter import PREFIX, Adapter
from lora2serve.adapters.lint import RANKS, next_rank
from lora2serve.errors import ExportError
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

EXPERTS = re.compile(r"\.experts(\.base_layer)?$")  # what PEFT calls the layers of ``target_parameters``


@dataclass(frozen=True)
class Normalized:
    """An adapter in the plain form. ``scale`` is that of most modules; the others' B carries the ratio."""

    adapter: Adapter
    specs: Sequence[TensorSpec]
    names: Mapping[str, str]  # name in the product -> name in the source
    rank: int
    scale: float
    ratios: Mapping[str, float]  # module -> its scale over ``scale``

    def tensors(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        """Spec and value, one by one."""
        for spec in self.specs:
            module, kind = split(spec.name)
            value = self.adapter.tensors.read(self.names[spec.name]).values
            if not _is_a(kind) and self.ratios[module] != 1:
                value = value.float() * self.ratios[module]
            yield spec, _pad(value, spec.shape, kind, _experts(self.adapter, module))

    def report(self) -> dict[str, Any]:
        """What the manifest should say."""
        return {"lossless": True, "rescaled": {name: ratio for name, ratio in self.ratios.items() if ratio != 1}}


def normalize(adapter: Adapter) -> Normalized:
    """Plan the plain form of an adapter whose modules are all plain LoRA; reads headers only."""
    heights = {name: _rank(adapter, name) for name in adapter.layers}
    if not heights:
        raise ExportError(f"{adapter.path}: no LoRA tensors", "--target vllm merges what was trained in full")
    rank = next_rank(max(heights.values()))
    if rank is None:
        raise ExportError(
            f"{adapter.path}: rank {max(heights.values())}, vLLM takes {RANKS[-1]} at most", "use --as-lora-rank"
        )
    scales = {name: adapter.scale(_pattern_name(name), height) for name, height in heights.items()}
    common = Counter(scales.values()).most_common(1)[0][0]
    ratios = {name: scale / common for name, scale in scales.items()}
    names = {_plain_name(spec.name): spec.name for spec in adapter.tensors.specs() if ".lora_" in spec.name}
    specs = [_grown(adapter, name, adapter.tensors.spec(old), rank, ratios) for name, old in names.items()]
    return Normalized(adapter, specs, names, rank, common, ratios)


def split(name: str) -> tuple[str, str]:
    """``("model.layers.0.self_attn.q_proj", "lora_A.weight")``."""
    module, _, kind = name.removeprefix(PREFIX).partition(".lora_")
    return module, f"lora_{kind}"


def _grown(adapter: Adapter, name: str, spec: TensorSpec, rank: int, ratios: Mapping[str, float]) -> TensorSpec:
    module, kind = split(name)
    height = rank * _experts(adapter, module)
    shape = (height, spec.shape[1]) if _is_a(kind) else (spec.shape[0], height)
    exact = _is_a(kind) or math.frexp(ratios[module])[0] == 0.5
    return TensorSpec(name, shape, spec.dtype if exact else "F32")


def _rank(adapter: Adapter, module: str) -> int:
    """The module's own rank; fused experts hold one rank per expert, one after another."""
    parts = adapter.layers[module].parts
    a = parts.get("lora_A") or parts["lora_embedding_A"]
    return a.shape[0] // _experts(adapter, module)


def _experts(adapter: Adapter, module: str) -> int:
    """How many experts' ranks A holds: more than one with PEFT's ``target_parameters`` only."""
    if not adapter.config.get("target_parameters") or not EXPERTS.search(module):
        return 1
    # scale = alpha / rank, so this is the rank that PEFT gave the module
    rank = adapter.rank(_pattern_name(module))
    return max(1, adapter.layers[module].parts["lora_A"].shape[0] // rank)


def _pattern_name(module: str) -> str:
    """PEFT matches patterns against parameters, but stores fused experts under their module's name."""
    if module.endswith(".experts.base_layer"):
        return module.removesuffix("base_layer") + "gate_up_proj"
    return f"{module}.down_proj" if module.endswith(".experts") else module


def _plain_name(name: str) -> str:
    """Without the adapter's own name, which old versions of PEFT kept in the key."""
    return re.sub(r"(\.lora_\w+)\.default(?=\.weight$|$)", r"\1", name)


def _is_a(kind: str) -> bool:
    return kind.startswith(("lora_A", "lora_embedding_A"))


def _pad(value: Tensor, shape: tuple[int, ...], kind: str, experts: int) -> Tensor:
    """Zeros where the rank grows: rows of A (per expert), columns of B (experts lie innermost there)."""
    if tuple(value.shape) == shape:
        return value
    if _is_a(kind):
        grown = value.new_zeros(experts, shape[0] // experts, shape[1])
        grown[:, : value.shape[0] // experts] = value.view(experts, -1, shape[1])
        return grown.view(shape)
    grown = value.new_zeros(shape)
    grown[:, : value.shape[1]] = value
    return grown
