"""LoRA on experts, as a GGUF adapter holds it: one A and one B for all experts of a layer.

llama.cpp stacks the experts of a layer in one tensor, and multiplies A (experts, rank, in) and B (experts, out, rank)
with the same ids as that tensor (``build_lora_mm_id`` in its src/llama-graph.cpp). An expert without LoRA has zeros.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from converters.gguf.native.native_layout import Placement
from converters.gguf.row_map import RowMaps
from lora2serve.adapters.deltas import AdapterTensor, Delta, ExpertLora, Lora
from lora2serve.exporting.sinks import ExportModel
from lora2serve.merge.fused_experts import OneExpertLora
from lora2serve.weights.tensors import ALL, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExpertRows:
    """The outputs of some experts that one stored tensor brings to one GGUF tensor.

    ``experts``: which, in the order of the stored tensor's own. ``outputs``: theirs in the stored tensor.
    """

    spec: TensorSpec
    target: str
    shape: tuple[int, int, int]  # of the GGUF tensor: experts, out, in
    experts: range
    outputs: slice
    transposed: bool  # stored as (in, out)

    def matrices(self, stored: Tensor) -> Iterator[Tensor]:
        """The stored values as (out, in), one for each expert, only those outputs."""
        for values in stored if stored.dim() == 3 else stored[None]:
            yield (values.T if self.transposed else values)[self.outputs]


@dataclass(frozen=True)
class ExpertTargets:
    """Of one model and its adapter: which GGUF tensor gets the LoRA on which experts."""

    rows: Mapping[str, Sequence[ExpertRows]]  # by stored name
    deltas: Mapping[str, Sequence[Delta]]
    changed: Mapping[str, Sequence[str]]  # tensor of the adapter -> every stored tensor that it changes

    def hold(self, tensor: str) -> bool:
        """Whether all that a tensor of the adapter changes is here."""
        stored = self.changed.get(tensor, ())
        return bool(stored) and all(name in self.rows for name in stored)

    def shapes(self) -> dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]]:
        """GGUF tensor -> the shapes of A and B."""
        shapes = {}
        for target, parts in self._parts.items():
            ranks: dict[int, int] = defaultdict(int)
            for _, delta, expert in self._changes(target):
                ranks[expert] += _rank(delta)
            (experts, out, into), rank = parts[0].shape, max(ranks.values())
            shapes[target] = (experts, rank, into), (experts, out, rank)
        return shapes

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """GGUF tensor, A and B, the scale in B, float32."""
        import torch

        read = lru_cache(maxsize=2)(AdapterTensor.read)  # all experts of a layer share one B
        for target, (a_shape, b_shape) in self.shapes().items():
            a, b = torch.zeros(a_shape), torch.zeros(b_shape)
            filled: dict[int, int] = defaultdict(int)
            for part, delta, expert in self._changes(target):
                own_a, own_b = _factors(delta, expert, part, read)
                ranks = slice(filled[expert], filled[expert] + own_a.shape[0])
                filled[expert] = ranks.stop
                a[expert, ranks], b[expert, :, ranks] = own_a, own_b
            yield target, a, b

    @cached_property
    def _parts(self) -> Mapping[str, Sequence[ExpertRows]]:
        """By GGUF tensor."""
        parts: dict[str, list[ExpertRows]] = defaultdict(list)
        for part in chain.from_iterable(self.rows.values()):
            parts[part.target].append(part)
        return parts

    def _changes(self, target: str) -> Iterator[tuple[ExpertRows, Delta, int]]:
        """All that is done to a GGUF tensor, expert by expert."""
        for part in self._parts[target]:
            for delta in self.deltas[part.spec.name]:
                for expert in _experts_of(delta, part):
                    yield part, delta, expert


def find_targets(model: ExportModel, row_maps: RowMaps) -> ExpertTargets:
    """Those of the tensors that the adapter changes, where our own tables say how the experts lie."""
    specs = {spec.name: spec for spec in model.source.specs()}
    rows, deltas = {}, {}
    changed: dict[str, list[str]] = defaultdict(list)
    for name in model.source.changed():
        own = model.source.deltas(name)
        for delta in own:
            if isinstance(delta, Lora | ExpertLora | OneExpertLora):
                changed[delta.a.name].append(name)
        parts = [_rows(specs[name], placement) for placement in row_maps.placed(name)]
        found = [part for part in parts if part is not None]
        if found and all(_fits(delta, part) for delta in own for part in found):
            rows[name], deltas[name] = found, own
    return ExpertTargets(rows, deltas, changed)


def _rows(spec: TensorSpec, placement: Placement) -> ExpertRows | None:
    """None for what holds no experts."""
    if len(placement.shape) != 3 or placement.head_rows or placement.add_one:
        return None
    shape = placement.shape[0], placement.shape[1], placement.shape[2]
    outputs = ALL if placement.half is None else slice(placement.half, None, 2)
    first = placement.first // shape[1]
    experts = range(shape[0]) if len(spec.shape) == 3 else range(first, first + 1)
    return ExpertRows(spec, placement.target, shape, experts, outputs, placement.transposed)


def _fits(delta: Delta, part: ExpertRows) -> bool:
    """Whether it is a LoRA whose B has the outputs of the tensor."""
    if isinstance(delta, ExpertLora):
        return delta.swapped == part.transposed
    if isinstance(delta, Lora):
        return delta.magnitude is None and not delta.transposed
    return isinstance(delta, OneExpertLora) and delta.transposed == part.transposed


def _rank(delta: Delta) -> int:
    assert isinstance(delta, Lora | ExpertLora | OneExpertLora)
    return delta.a.shape[0] // (delta.experts if isinstance(delta, ExpertLora) else 1)


def _experts_of(delta: Delta, part: ExpertRows) -> range:
    """The experts of the GGUF tensor that it changes."""
    return range(delta.expert, delta.expert + 1) if isinstance(delta, OneExpertLora) else part.experts


def _factors(
    delta: Delta, expert: int, part: ExpertRows, read: Callable[[AdapterTensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with the scale, of those outputs of one expert."""
    import torch

    if isinstance(delta, ExpertLora):
        a, b = delta.factors(expert, read(delta.b))
        b = b[delta.first : delta.first + part.spec.rows] if delta.expert is not None else b
    elif isinstance(delta, OneExpertLora):
        own = read(delta.b)
        b = torch.zeros(part.spec.shape[2 if delta.transposed else 1], own.shape[1])
        a, b[delta.outputs] = read(delta.a), own
    else:
        assert isinstance(delta, Lora)
        a, b = read(delta.a), read(delta.b)
    return a, (b * delta.scale)[part.outputs]
