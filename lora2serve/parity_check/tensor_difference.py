"""How far one stored tensor is from the planned one: sums over blocks of rows, in float64 and constant memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora2serve.artifacts.parity_report import TensorError

if TYPE_CHECKING:
    from torch import Tensor

UNRELATED, RELATED = 1.5, 0.75  # error / power of values that have nothing to do with the plan (2), and of others
LEAST_ACROSS = 1e-6  # of a change: one that lies along the plan cannot be told from its scale
UNIT = 256  # values looked at together: a superblock of ggml's K-quants, eight blocks of its other types


@dataclass
class ChangeSums:
    """How much of the adapter's change D is in a stored tensor S, beside A, the plan quantized here: 1 is as much.

    A coarse quantizer answers a change with a part of it, and another one with another part: of the plan X itself it
    keeps <A, X> / <X, X>. So S is compared with c A, where c = <S, X> / <A, X>. What rounding is in both is in neither.
    Of D itself only what is at right angles to X can be told from c: <D, D> - <D, X>^2 / <X, X>. The deviation is that
    of a ratio of two sums over units of ``UNIT`` values (W. G. Cochran, Sampling Techniques, 1977, 6.4).
    """

    units: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))  # of <S, D>, <A, D>, <D, D> of each unit
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3)))
    along_plan: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))  # <S, X>, <A, X>, <X, X>, <D, X>

    def add(self, change: Tensor, planned: Tensor, stored: Tensor, again: Tensor) -> None:
        """Count some rows in, all float64."""
        each = np.stack([_units(side * change).sum(1).numpy() for side in (stored, again, change)])
        self.units += each.shape[1]
        self.sums += each.sum(1)
        self.products += each @ each.T
        self.along_plan += [float((side * planned).sum()) for side in (stored, again, planned, change)]

    def strength(self) -> tuple[float, float] | None:
        """With its standard error; None where nothing is to change, or nothing is left of the plan."""
        stored, again, plan, along = self.along_plan
        whole = self.sums[2]
        if whole <= 0 or min(stored, again, plan) <= 0:
            return None
        across = max(whole - along**2 / plan, LEAST_ACROSS * whole)
        scale = stored / again
        added = (self.sums[0] - scale * self.sums[1]) / across
        kept = stored / plan - added * along / plan  # of the plan itself, without what the other change adds to it
        if kept <= 0:
            return None
        weights = np.array([1.0, -scale, -added * across / whole])
        squares = max(float(weights @ self.products @ weights), 0.0)
        deviation = (squares * self.units / max(self.units - 1, 1)) ** 0.5 / (kept * across)
        return 1 + float(added / kept), float(deviation)


@dataclass
class TensorDifference:
    """``name`` is the export's, ``source`` the model's."""

    name: str
    source: str = ""
    error: float = 0.0  # sum of squared differences
    power: float = 0.0  # sum of squared planned values
    own: float = 0.0  # what ``error`` would be if this machine's quantizer had made it
    quantized: bool = False
    largest: float = 0.0  # largest absolute difference
    worst: float = 0.0  # error / power of the worst ``UNIT`` values
    lost: int = 0  # ``UNIT``s that have nothing of the plan: zeros, or other values, where they need not be
    change: ChangeSums = field(default_factory=ChangeSums)

    @property
    def nmse(self) -> float:
        """error / power; infinite where only one of the two is zero."""
        return _share(self.error, self.power)

    def figures(self) -> TensorError:
        """For the report."""
        strength, deviation = self.change.strength() or (None, None)
        return TensorError(
            self.name, self.nmse, self.worst, self.largest, strength, deviation=deviation,
            own=_share(self.own, self.power) if self.quantized else None, lost=self.lost, source=self.source,
        )  # fmt: skip

    def add_change(self, base: Tensor, expected: Tensor, stored: Tensor, again: Tensor | None = None) -> None:
        """Count the adapter's part of some rows in."""
        planned = expected.double()
        twin = planned if again is None else again.double()
        self.change.add(planned - base.double(), planned, stored.double(), twin)

    def add(self, expected: Tensor, stored: Tensor, again: Tensor | None = None) -> None:
        """Count some rows in; a NaN counts as an infinite error. ``again``: quantized here, where it is quantized."""
        import torch

        difference = (expected.double() - stored.double()).square().nan_to_num(nan=torch.inf)
        power = expected.double().square()
        self.error += float(difference.sum())
        self.power += float(power.sum())
        self.largest = max(self.largest, float(difference.max().sqrt()) if difference.numel() else 0.0)
        errors, powers = (_units(values).sum(1) for values in (difference, power))
        if not len(errors):
            return
        at = int(torch.where(errors > 0, errors / powers, 0.0).argmax())
        self.worst = max(self.worst, _share(float(errors[at]), float(powers[at])))
        if again is not None:
            self.quantized = True
            own = _units((expected.double() - again.double()).square()).sum(1)
            self.own += float(own.sum())
            empty, meant = ((_units(values) == 0).all(1) for values in (stored, again))
            unrelated = (errors > UNRELATED * powers) & (own < RELATED * powers)
            self.lost += int(((empty & ~meant) | unrelated).sum())


def _units(values: Tensor) -> Tensor:
    """(units, ``UNIT``), padded with zeros."""
    import torch

    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % UNIT)).view(-1, UNIT)


def _share(error: float, power: float) -> float:
    if error == 0:
        return 0.0
    return error / power if power > 0 else float("inf")
