"""How much of an adapter's change is still there once the merged weights are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from math import isfinite, sqrt
from operator import add
from threading import Lock
from typing import TYPE_CHECKING

from lora2serve.errors import MergeError
from lora2serve.weights.tensors import FLOATS, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

VANISHED = 0.01  # share of a delta that survives the cast, below which it is not there


class Survival:
    """How much of each delta is left after the cast: ``|cast(W') - cast(W)| / |dW|``, in Frobenius norms.

    Where the base is stored in the type that is written, ``cast(W)`` is ``W``. Elsewhere the cast of the base alone
    is no part of the delta, and would hide one that vanished; and a value of the base that lies between two of the type
    is tipped over by the smallest delta, a whole step for next to nothing. So there it is the cosine of the angle
    between the two changes; its square is about the share of values that moved.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # surviving, delta, and where the angle counts their product
        self._lock = Lock()

    def add(self, spec: TensorSpec, before: Tensor, after: Tensor, delta: float | None, on_grid: bool) -> Tensor | None:
        """Count one block, both float32; ``delta`` is the delta's squared norm, where it is known already.

        The rows as they are stored, if the sums prove that every value is finite, before, after and as stored: one
        that is not makes the difference NaN or infinite, and so its norm.
        """
        if spec.dtype not in FLOATS or before.shape != after.shape:
            return None
        if delta is None:
            delta = squared_norm(after - before)
        stored = after.to(torch_dtype(spec.dtype))
        start = before if on_grid else before.to(stored.dtype).float()
        kept = stored - start if stored is after else stored.float().sub_(start)
        block = [squared_norm(kept), delta]
        if not on_grid:
            block.append(float((after - before).flatten().dot(kept.flatten())))
        with self._lock:
            self._sums[spec.name] = list(map(add, self._sums.get(spec.name, repeat(0.0)), block))
        return stored if isfinite(block[0]) else None

    def shares(self) -> dict[str, float]:
        """Tensor -> share; 0 where the adapter changes nothing."""
        return {name: _share(*sums) for name, sums in sorted(self._sums.items())}

    def sums(self, names: Sequence[str]) -> dict[str, list[float]]:
        """Those of some tensors, for ``take`` of another process."""
        return {name: self._sums[name] for name in names if name in self._sums}

    def take(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Instead of its own, those of a process that has read these tensors to their ends."""
        self._sums.update({name: list(pair) for name, pair in sums.items()})

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


def _share(surviving: float, delta: float, product: float | None = None) -> float:
    if not surviving or not delta:
        return 0.0
    return sqrt(surviving / delta) if product is None else max(0.0, product) / sqrt(surviving * delta)


def squared_norm(values: Tensor) -> float:
    """The sum of squares, in float32."""
    import torch

    flat = values.flatten()
    return float(torch.dot(flat, flat))
