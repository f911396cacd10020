"""What an adapter does to one weight, row by row, in float32.

Every fold here is local to a row of the stored weight (DoRA's norm too), so a block of rows is all it
needs. The sums run in PEFT's order (``W + (B @ A) * scale``), PEFT's ``merge_and_unload`` in float32
being what the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp
from typing import TYPE_CHECKING, ClassVar, Protocol

from lora2serve.weights.tensors import ALL, Source

if TYPE_CHECKING:
    from torch import Tensor


FEWEST_ROWS = 16  # of a product that a BLAS sums in the same order whatever the number of rows; measured: 4


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter file, read when it is used."""

    source: Source
    name: str
    shape: tuple[int, ...]

    def read(self, rows: slice = ALL) -> Tensor:
        """Those rows in float32."""
        return self.source.read(self.name, rows).values.float()


class Delta(Protocol):
    """What an adapter does to one weight."""

    @property
    def whole(self) -> bool:
        """Whether it needs all rows together."""
        ...

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """The weight's shape after this delta; ValueError in words where the two do not fit."""
        ...

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        """Rows ``[start, stop)`` of the weight, float32 in and out; ``weight`` itself stays as it is."""
        ...


@dataclass(frozen=True)
class Lora:
    """``W + scale * B @ A`` for a linear layer (https://arxiv.org/abs/2106.09685), W: (out, in).

    ``magnitude`` makes it DoRA (https://arxiv.org/abs/2402.09353): rows are rescaled to that norm.
    ``transposed``: W is stored as (in, out).
    """

    a: AdapterTensor  # (r, in)
    b: AdapterTensor  # (out, r)
    scale: float
    magnitude: AdapterTensor | None = None  # (out,)
    transposed: bool = False

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        expected = (self.b.shape[0], self.a.shape[-1])
        if self.transposed:
            expected = expected[::-1]
        if before != expected:
            raise ValueError(f"the adapter is for {list(expected)}, the base has {list(before)}")
        return before

    def added(self, rows: slice, a: Tensor | None = None) -> Tensor:
        """``scale * B @ A`` for those rows of the stored weight, a new tensor; ``a`` where A is in memory already."""
        a = self.a.read() if a is None else a
        wide, own = _widened(rows, (a.shape[-1] if self.transposed else self.b.shape[0]))
        if self.transposed:
            return _scaled(self.b.read(), a[:, wide], self.scale).T[own].contiguous()
        return _scaled(self.b.read(wide), a, self.scale)[own]

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        import torch

        merged = self.added(rows).add_(weight)
        if self.magnitude is None:
            return merged
        if self.transposed:  # one norm per column, over all rows: such a weight is read whole
            return merged.mul_(self.magnitude.read() / torch.linalg.norm(merged, dim=0))
        return merged.mul_((self.magnitude.read(rows) / torch.linalg.norm(merged, dim=1)).unsqueeze(1))

    @property
    def whole(self) -> bool:
        return self.transposed and self.magnitude is not None


@dataclass(frozen=True)
class EmbeddingLora:
    """``W + scale * (B @ A).T`` for an embedding, W: (tokens, dim); DoRA's norm runs over the columns."""

    a: AdapterTensor  # (r, tokens)
    b: AdapterTensor  # (dim, r)
    scale: float
    magnitude: AdapterTensor | None = None  # (dim,)

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        expected = (self.a.shape[-1], self.b.shape[0])
        if before != expected:
            raise ValueError(f"the adapter is for {list(expected)}, the base has {list(before)}")
        return before

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        import torch

        wide, own = _widened(rows, self.a.shape[-1])
        delta = (self.b.read() @ self.a.read()[:, wide]).T[own].contiguous()
        merged = delta.mul_(self.scale).add_(weight)
        if self.magnitude is None:
            return merged
        return merged.mul_(self.magnitude.read() / torch.linalg.norm(merged, dim=0))

    @property
    def whole(self) -> bool:
        return self.magnitude is not None


@dataclass(frozen=True)
class ExpertLora:
    """LoRA on some rows of one expert: what PEFT's ``target_parameters`` does to a fused 3-D weight.

    A holds the experts' ranks one after another, (experts * r, in); B interleaves them, (out, r * experts):
    ``peft/tuners/lora/layer.py``, ``ParamWrapper.get_delta_weight``. ``expert`` None: the stored weight is the
    fused one and its rows are experts; else it is one expert's own tensor, ``first`` its first row in the fused one.
    ``swapped`` says that the fused weight is stored as (experts, in, out).
    """

    a: AdapterTensor
    b: AdapterTensor
    scale: float
    experts: int
    swapped: bool = False
    expert: int | None = None
    first: int = 0
    whole: ClassVar[bool] = False

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        out, into = self.b.shape[0], self.a.shape[-1]
        each = (into, out) if self.swapped else (out, into)
        fits = before == (self.experts, *each) if self.expert is None else self._holds(before, each)
        if not fits:
            raise ValueError(f"the adapter is for {self.experts} experts of {list(each)}, the base has {list(before)}")
        return before

    def _holds(self, before: tuple[int, ...], each: tuple[int, ...]) -> bool:
        return len(before) == 2 and before[1] == each[1] and self.first + before[0] <= each[0]

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        if self.expert is not None:
            part = slice(self.first + rows.start, self.first + rows.stop)
            return self._delta(self.expert, part).add_(weight)
        merged = weight.clone()
        for position, expert in enumerate(range(rows.start, rows.stop)):
            merged[position] += self._delta(expert, ALL)
        return merged

    def factors(self, expert: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one expert in the fused weight, without the scale; ``b``: rows of the whole B."""
        rank = self.a.shape[0] // self.experts
        return self.a.read(slice(expert * rank, (expert + 1) * rank)), b[:, expert :: self.experts]

    def _delta(self, expert: int, rows: slice) -> Tensor:
        if self.swapped:
            a, b = self.factors(expert, self.b.read())
            return (a.T[rows] @ b.T).mul_(self.scale)
        a, b = self.factors(expert, self.b.read(rows))
        return (b @ a).mul_(self.scale)


@dataclass(frozen=True)
class Replace:
    """A weight that was trained in full (``modules_to_save``, a trained bias, a resized embedding)."""

    value: AdapterTensor
    whole: ClassVar[bool] = False

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        if before[1:] != self.value.shape[1:]:
            raise ValueError(f"the adapter brings {list(self.value.shape)}, the base has {list(before)}")
        return self.value.shape

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        return self.value.read(rows)


@dataclass(frozen=True)
class ReplaceRows:
    """Trained rows of an embedding (``trainable_token_indices``), those behind its last one among them."""

    value: AdapterTensor  # (len(indices), dim)
    indices: tuple[int, ...]
    whole: ClassVar[bool] = False

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        if before[1:] != self.value.shape[1:] or len(self.indices) != self.value.shape[0]:
            raise ValueError(
                f"the adapter has {list(self.value.shape)} for {len(self.indices)} tokens, the base {list(before)}"
            )
        rows = max(before[0], max(self.indices) + 1)
        strange = [index for index in self.indices if not 0 <= index < before[0]]
        if sorted(strange) != list(range(before[0], rows)):  # rows between would be nobody's
            raise ValueError(f"the adapter trains token {strange[0]}, the base has 0 to {before[0] - 1}")
        return (rows, *before[1:])

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        places = [(n, index - rows.start) for n, index in enumerate(self.indices) if rows.start <= index < rows.stop]
        if not places:
            return weight
        sources, targets = zip(*places, strict=True)
        merged = weight.clone()
        merged[list(targets)] = self.value.read()[list(sources)]
        return merged


@dataclass(frozen=True)
class AddVector:
    """``bias + scale * B.bias`` (PEFT's ``lora_bias``)."""

    value: AdapterTensor
    scale: float
    whole: ClassVar[bool] = False

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        if before != self.value.shape:
            raise ValueError(f"the adapter brings a bias of {list(self.value.shape)}, the base has {list(before)}")
        return before

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        return weight + self.value.read(rows) * self.scale


def _scaled(b: Tensor, a: Tensor, scale: float) -> Tensor:
    """``(B @ A) * scale``, a new tensor. A power of two rounds nothing, and goes to B, which is the smaller one."""
    if abs(frexp(scale)[0]) == 0.5:
        return (b * scale) @ a
    return (b @ a).mul_(scale)


def _widened(rows: slice, count: int) -> tuple[slice, slice]:
    """Rows to compute, and which of them are meant: so many that their sums do not depend on how a weight is cut.

    For fewer, a BLAS has kernels that sum in another order: the same fold, read in other blocks, would differ in the
    last bit.
    """
    start, stop, _ = rows.indices(count)
    first = max(0, min(start, count - FEWEST_ROWS))
    last = min(count, max(stop, first + FEWEST_ROWS))
    return slice(first, last), slice(start - first, stop - first)
