"""The fold: a base and its adapters, seen as one model of plain weights.

    model = Merged(Dequantized(Checkpoint(path)), [open_adapter(adapter)], config)

Binding happens in the constructor: every change must find one weight of the right shape, every
adapter tensor must be used, and all that does not fit is reported together, before a weight is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from threading import Lock
from typing import TYPE_CHECKING, Any

from lora2serve.adapters.adapter import Adapter, ParameterDelta
from lora2serve.adapters.deltas import Delta, Lora, Replace
from lora2serve.adapters.peft_layers import PeftDelta, PeftLayers
from lora2serve.errors import MergeError, raise_all
from lora2serve.merge.binding import Binder
from lora2serve.merge.layout import EMBEDDINGS, HEAD, lay_out
from lora2serve.weights.tensors import ALL, FLOATS, Block, DType, Source, TensorSpec, all_finite, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


VANISHED = 0.01  # share of a delta that survives the cast, below which it is not there


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model: which stored tensor it starts from, and what happens to it."""

    spec: TensorSpec
    stored: str
    deltas: tuple[Delta, ...]


class Merged:
    """Base plus adapters. ``read`` gives float32 where something was folded or dequantised, else the stored type."""

    def __init__(
        self, base: Source, adapters: Sequence[Adapter], config: Mapping[str, Any], dtype: DType | None = None
    ) -> None:
        self.base, self.config = base, dict(config)
        self.survival = Survival()
        stored = list(base.specs())
        main = _main_dtype(stored) if dtype else None
        slots, changes = lay_out(stored, adapters, self.config)
        bound = self._bind([slot.spec for slot in slots], adapters, changes)
        self._folded: dict[str, MergedTensor] = {}
        problems = []
        for slot in slots:
            deltas = tuple(bound.get(slot.spec.name, ()))
            try:
                shape = slot.spec.shape
                for delta in deltas:
                    shape = delta.shape(shape)
            except ValueError as error:
                problems.append(f"{slot.spec.name}: {error}")
                continue
            kept = dtype if dtype and slot.spec.dtype == main else slot.spec.dtype
            whole = slot.spec.whole or any(delta.whole for delta in deltas)
            self._folded[slot.spec.name] = MergedTensor(
                TensorSpec(slot.spec.name, shape, kept, whole), slot.stored, deltas
            )
        raise_all(problems, MergeError)
        self._resize_config()

    def _weight_beside(self, name: str, layers: PeftLayers) -> Tensor:
        """A whole weight as it is before the deltas of ``layers``, for the bias that depends on it."""
        folded = self._folded[name]
        weight = self.base.read(folded.stored).values.float()
        for delta in folded.deltas:
            if isinstance(delta, PeftDelta) and delta.layers is layers:
                break
            weight = delta.apply(weight, slice(0, folded.spec.rows))
        return weight

    def specs(self) -> Sequence[TensorSpec]:
        return [folded.spec for folded in self._folded.values()]

    def changed(self) -> list[str]:
        """The names of the tensors that an adapter changes."""
        return [name for name, folded in self._folded.items() if folded.deltas]

    def before(self, name: str, rows: slice = ALL) -> Block:
        """Rows of the base that one tensor starts from."""
        return self.base.read(self._folded[name].stored, rows)

    def read(self, name: str, rows: slice = ALL) -> Block:
        folded = self._folded[name]
        spec = folded.spec
        start, stop, _ = rows.indices(spec.rows)
        if not folded.deltas:
            block = self.base.read(folded.stored, rows)
            _finite(block.values, name, "base")
            return block
        if spec.whole:
            return self._fold(folded, slice(0, spec.rows))[start:stop]
        return self._fold(folded, slice(start, stop))

    def _fold(self, folded: MergedTensor, rows: slice) -> Block:
        import torch

        name, deltas = folded.spec.name, folded.deltas
        if isinstance(deltas[0], Replace):  # the base's rows do not matter, and there may be fewer of them
            stored = before = weight = _finite(deltas[0].apply(torch.empty(0), rows), name, "adapter")
            deltas = deltas[1:]
        else:
            stored = self.base.read(folded.stored, rows).values
            before = weight = stored.float()
        wanted = None
        if len(deltas) == 1 and isinstance(deltas[0], Lora) and deltas[0].magnitude is None:
            change = deltas[0].added(rows)
            wanted = _squared(change)
            weight = change.add_(before)
        else:
            for delta in deltas:
                weight = delta.apply(weight, rows)
        on_grid = stored.dtype == torch_dtype(folded.spec.dtype)
        rounded = self.survival.add(folded.spec, before, weight, wanted, on_grid) if deltas else None
        if deltas and rounded is None:
            _finite(before, name, "base")
            _finite(weight, name, "adapter, or the sum of base and adapter")
        return Block(weight, rounded)

    def _bind(
        self, specs: Sequence[TensorSpec], adapters: Sequence[Adapter], changes: Sequence[Sequence[ParameterDelta]]
    ) -> dict[str, list[Delta]]:
        """Deltas by the name of the weight they land in; what lands nowhere is an error that names it."""
        names = Binder(specs, self.config)
        bound: dict[str, list[Delta]] = defaultdict(list)
        lost = []
        for adapter, part in zip(adapters, changes, strict=True):
            for change in part:
                places = names.find(change, adapter)
                if not places:
                    near = names.nearest(change.parameter)
                    lost.append(f"{change.parameter}: the adapter changes it, the base has no such weight{near}")
                for name, delta in places:
                    bound[name].append(delta)
                    if isinstance(delta, PeftDelta):
                        delta.layers.weights[change.parameter] = partial(self._weight_beside, name, delta.layers)
        if lost:
            hint = "this adapter belongs to another base: name it with --base"
            total = sum(len(part) for part in changes)
            raise_all(
                [f"{len(lost)} of {total} changes fit no weight of the base:", *lost],
                lambda text: MergeError(text, hint),
            )
        return bound

    def _resize_config(self) -> None:
        """A vocabulary that grew, in the config; embedding and head must agree."""
        rows = {n: f.spec.rows for n, f in self._folded.items() if n.endswith(EMBEDDINGS) or n.endswith(HEAD)}
        if len(set(rows.values())) > 1:
            told = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
            raise MergeError(f"embedding and head differ: {told}", "save the adapter with save_embedding_layers=True")
        part = self.config.get("text_config") if "vocab_size" not in self.config else self.config
        for count in set(rows.values()):
            if (
                part
                and count != part.get("vocab_size")
                and any(isinstance(d, Replace) for n in rows for d in self._folded[n].deltas)
            ):
                part["vocab_size"] = count


class Survival:
    """How much of each delta is left after the cast: ``|cast(W') - cast(W)| / |dW|``, in Frobenius norms.

    Where the base is stored in the type that is written, ``cast(W)`` is ``W``. Elsewhere the cast of the base alone
    is no part of the delta, and would hide one that vanished.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._lock = Lock()

    def add(
        self, spec: TensorSpec, before: Tensor, after: Tensor, wanted: float | None, on_grid: bool
    ) -> Tensor | None:
        """Count one block, both float32; ``wanted`` is the delta's squared norm, where it is known already.

        The rows as they are stored, if the sums prove that every value is finite, before, after and as stored: one
        that is not makes the difference NaN or infinite, and so its norm.
        """
        if spec.dtype not in FLOATS or before.shape != after.shape:
            return None
        if wanted is None:
            wanted = _squared(after - before)
        stored = after.to(torch_dtype(spec.dtype))
        start = before if on_grid else before.to(stored.dtype).float()
        kept = _squared(stored - start if stored is after else stored.float().sub_(start))
        with self._lock:
            sums = self._sums[spec.name]
            sums[0] += kept
            sums[1] += wanted
        return stored if isfinite(kept) else None

    def shares(self) -> dict[str, float]:
        """Tensor -> share; 0 where the adapter changes nothing."""
        return {name: (kept / wanted) ** 0.5 if wanted else 0.0 for name, (kept, wanted) in sorted(self._sums.items())}

    def check(self) -> list[str]:
        """Warnings that name tensors whose delta vanished. MergeError where all did: a wrong or a fresh adapter."""
        shares = self.shares()
        gone = [name for name, share in shares.items() if share < VANISHED]
        if gone and len(gone) == len(shares):
            raise MergeError(
                f"the adapter changes nothing: at most {max(shares.values()):.4f} of any delta survives",
                "B is still zero (a fresh adapter), or alpha is far too small",
            )
        if not gone:
            return []
        named = ", ".join(f"{name} ({shares[name]:.4f} survives)" for name in gone[:3])
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        return [f"the adapter changes nothing in {len(gone)} of {len(shares)} tensors: {named}{more}"]


def _squared(values: Tensor) -> float:
    import torch

    flat = values.flatten()
    return float(torch.dot(flat, flat))


def _finite(values: Tensor, name: str, what: str) -> Tensor:
    """The values, if every one is finite."""
    if values.is_floating_point() and values.element_size() > 1 and not all_finite(values):
        raise MergeError(
            f"{name}: NaN or infinity, from the {what}", "such weights give nonsense: train or fetch again"
        )
    return values


def _main_dtype(specs: Sequence[TensorSpec]) -> DType | None:
    """The float type that most of the model is in."""
    total: dict[DType, int] = defaultdict(int)
    for spec in specs:
        if spec.dtype in FLOATS:
            total[spec.dtype] += spec.numel
    return max(total, key=lambda kind: total[kind], default=None)
