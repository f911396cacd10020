"""The tensor gate: an export, opened by its format's own reader, against the fold that was planned for it.

Runs in a worker process like an engine, since a damaged file may hang its reader or end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2serve.artifacts.manifest import Manifest
from lora2serve.exporting import sinks
from lora2serve.exporting.sinks import ExportModel
from lora2serve.parity_check.trained_model import open_model
from lora2serve.weights.tensors import TensorSpec, row_blocks

if TYPE_CHECKING:
    from torch import Tensor

UNIT = 256  # values looked at together: a superblock of ggml's K-quants, eight blocks of its other types


@dataclass
class TensorDifference:
    """How far one stored tensor is from the planned one."""

    name: str
    error: float = 0.0  # sum of squared differences
    power: float = 0.0  # sum of squared planned values
    largest: float = 0.0  # largest absolute difference
    worst: float = 0.0  # error / power of the worst ``UNIT`` values
    along: float = 0.0  # sum of (stored - base) times (planned - base)
    delta: float = 0.0  # sum of squared (planned - base)

    @property
    def nmse(self) -> float:
        """error / power; infinite where only one of the two is zero."""
        return _share(self.error, self.power)

    @property
    def strength(self) -> float | None:
        """How much of the adapter's change is in the stored tensor: 1 as planned, 0 none; None where it has none."""
        return self.along / self.delta if self.delta > 0 else None

    def add_change(self, base: Tensor, expected: Tensor, stored: Tensor) -> None:
        """Count the adapter's part of some rows in."""
        planned, actual = expected.double() - base.double(), stored.double() - base.double()
        self.along += float((planned * actual).sum())
        self.delta += float(planned.square().sum())

    def add(self, expected: Tensor, stored: Tensor) -> None:
        """Count some rows in; a NaN counts as an infinite error."""
        import torch

        difference = (expected.double() - stored.double()).flatten().square().nan_to_num(nan=torch.inf)
        power = expected.double().flatten().square()
        self.error += float(difference.sum())
        self.power += float(power.sum())
        self.largest = max(self.largest, float(difference.max().sqrt()) if len(difference) else 0.0)
        padding = -len(power) % UNIT
        errors, powers = (
            torch.nn.functional.pad(part, (0, padding)).view(-1, UNIT).sum(1) for part in (difference, power)
        )
        at = int(torch.where(errors > 0, errors / powers, 0.0).argmax()) if len(errors) else 0
        self.worst = max(self.worst, _share(float(errors[at]), float(powers[at]))) if len(errors) else self.worst


def _share(error: float, power: float) -> float:
    if error == 0:
        return 0.0
    return error / power if power > 0 else float("inf")


class TensorComparator:
    """What compares exports with the model they were planned from, one after another: the libraries load once."""

    def __init__(self, origin: Mapping[str, Any]) -> None:
        self._trained = origin

    def compare(self, export: Path, advance: Callable[[int], None]) -> dict[str, Any] | None:
        """Every tensor's difference, the largest first; None where the target has no reader."""
        self.path, self.manifest = export, Manifest.read(export)
        served_on_plain = self.manifest.is_adapter  # whatever it was trained on
        self.origin = {**self._trained, "run": None} if served_on_plain else self._trained
        if self.manifest.target == "adapter":
            return self._compare_adapters(advance)
        kind = sinks.find_reader(self.manifest.target)
        if kind is None:
            return None
        model = open_model(self.origin, self.manifest)
        merged = model.source
        reader: sinks.Reader = kind(self.path, self.manifest, model)
        changed, differences = set(merged.changed()), dict[str, TensorDifference]()
        for spec, rows in _parts(model, reader.wanted):
            name, expected, stored = reader.pair(spec, rows, merged.read(spec.name, rows).values)
            difference = differences.setdefault(name, TensorDifference(name))
            difference.add(expected, stored)
            if spec.name in changed:
                base = merged.before(spec.name, rows).values
                if base.numel() == expected.numel():  # not where the vocabulary grew
                    difference.add_change(reader.pair(spec, rows, base)[1], expected, stored)
            advance(expected.numel())
        return _figures(differences, reader.differences)

    def _compare_adapters(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """A raw adapter, folded, against the trained one, folded."""
        trained, exported = (
            open_model({**self.origin, "adapters": adapters}, self.manifest)
            for adapters in (self.origin["adapters"], [str(self.path)])
        )
        merged, other = trained.source, exported.source
        differences: dict[str, TensorDifference] = {}
        for spec, rows in _parts(trained, dict.fromkeys(merged.changed(), 1)):
            difference = differences.setdefault(spec.name, TensorDifference(spec.name))
            expected, stored = (side.read(spec.name, rows).values for side in (merged, other))
            difference.add(expected, stored)
            base = merged.before(spec.name, rows).values
            if base.numel() == expected.numel():
                difference.add_change(base, expected, stored)
            advance(expected.numel())
        return _figures(
            differences, [f"{name}: not planned" for name in sorted({*other.changed()} - {*merged.changed()})]
        )


def _figures(differences: Mapping[str, TensorDifference], missing: Sequence[str]) -> dict[str, Any]:
    ordered = sorted(differences.values(), key=lambda item: (item.nmse, item.worst), reverse=True)
    return {
        "missing": list(missing),
        "tensors": [asdict(item) | {"nmse": item.nmse, "strength": item.strength} for item in ordered],
    }


def _parts(model: ExportModel, wanted: Mapping[str, int]) -> Iterator[tuple[TensorSpec, slice]]:
    for spec in model.source.specs():
        if spec.name in wanted:
            for rows in row_blocks(spec, wanted[spec.name]):
                yield spec, rows
