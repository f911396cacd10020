"""The tensor gate: an export made again and compared byte by byte, or measured against the fold it was planned from.

What this machine's libraries make the same way again must be equal. What they do not (an importance matrix that is
gone, AWQ and GPTQ, another version's quantizer) is opened by its format's own reader and kept to bounds by its type.
Runs in a worker process like an engine, since a damaged file may hang its reader or end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.parity_report import TensorError
from lora2serve.errors import EngineError, ExportError
from lora2serve.exporting import sinks
from lora2serve.exporting.sinks import ExportModel
from lora2serve.parity_check.exact_comparison import ExactComparison, compare_exactly
from lora2serve.parity_check.repeatable import NotRepeatable, recorded_options, require_same_libraries
from lora2serve.parity_check.tensor_difference import TensorDifference
from lora2serve.parity_check.tensor_verdict import TensorFigures
from lora2serve.parity_check.trained_model import open_model
from lora2serve.weights.tensors import TensorSpec, row_blocks


class TensorComparator:
    """What compares exports with the model they were planned from, one after another: the libraries load once."""

    def __init__(self, origin: Mapping[str, Any]) -> None:
        self._trained = origin

    def compare(self, export: Path, advance: Callable[[int], None], *, measure: bool = False) -> TensorFigures | None:
        """What is different, and how far; None where the target has no reader. ``measure``: even where all is equal."""
        self.path, self.manifest = export, Manifest.read(export)
        served_on_plain = self.manifest.is_adapter  # whatever it was trained on
        self.origin = {**self._trained, "run": None} if served_on_plain else self._trained
        if self.manifest.target != "adapter" and sinks.find_reader(self.manifest.target) is None:
            return None
        try:
            exact, reason = self._make_again(advance), ""
        except NotRepeatable as error:
            exact, reason = ExactComparison(), error.message
        found = TensorFigures(
            compared=exact.compared, reason=reason, names=tuple(exact.names), kinds=tuple(exact.kinds),
            coarser=exact.coarser, different={name: str(words) for name, words in exact.different.items()},
        )  # fmt: skip
        if found.kinds or (not reason and exact.equal and not measure):
            return found
        try:
            differences, missing = self._measure(advance)
        except ExportError as error:  # not readable as what it should be
            return found if found.different else replace(found, kinds=(error.message,))
        if exact.different:
            try:
                require_same_libraries(self.manifest)
            except NotRepeatable as error:
                found = replace(found, reason=error.message)
        errors = sorted((item.figures() for item in differences.values()), key=_rank, reverse=True)
        return replace(
            found, compared=max(exact.compared, len(errors)), names=found.names or missing, tensors=tuple(errors)
        )

    def _make_again(self, advance: Callable[[int], None]) -> ExactComparison:
        """NotRepeatable, with the reason, where that is not possible here."""
        model = open_model(self.origin, self.manifest)
        options = recorded_options(self.path, self.manifest)
        try:
            return compare_exactly(self.path, self.manifest, model, options, advance)
        except (ExportError, EngineError) as error:
            raise NotRepeatable(f"it cannot be made again here: {error.message}") from None

    def _measure(self, advance: Callable[[int], None]) -> tuple[dict[str, TensorDifference], tuple[str, ...]]:
        """Every tensor's difference, and what is missing or was not planned."""
        if self.manifest.target == "adapter":
            return self._measure_adapters(advance)
        kind = sinks.find_reader(self.manifest.target)
        assert kind is not None
        model = open_model(self.origin, self.manifest)
        merged = model.source
        reader: sinks.Reader = kind(self.path, self.manifest, model)
        changed, differences = set(merged.changed()), dict[str, TensorDifference]()
        for spec, rows in parts(model, reader.wanted):
            block = merged.read(spec.name, rows).values
            name, expected, stored = reader.pair(spec, rows, block)
            again = reader.again(spec, rows, block)
            difference = differences.setdefault(name, TensorDifference(name, spec.name))
            difference.add(expected, stored, again)
            if spec.name in changed:
                base = merged.before(spec.name, rows).values
                if base.numel() == expected.numel():  # not where the vocabulary grew
                    difference.add_change(reader.pair(spec, rows, base)[1], expected, stored, again)
            advance(expected.numel())
        return differences, tuple(reader.differences)

    def _measure_adapters(self, advance: Callable[[int], None]) -> tuple[dict[str, TensorDifference], tuple[str, ...]]:
        """A raw adapter, folded, against the trained one, folded."""
        trained, exported = (
            open_model({**self.origin, "adapters": adapters}, self.manifest)
            for adapters in (self.origin["adapters"], [str(self.path)])
        )
        merged, other = trained.source, exported.source
        differences: dict[str, TensorDifference] = {}
        for spec, rows in parts(trained, dict.fromkeys(merged.changed(), 1)):
            difference = differences.setdefault(spec.name, TensorDifference(spec.name, spec.name))
            expected, stored = (side.read(spec.name, rows).values for side in (merged, other))
            difference.add(expected, stored)
            base = merged.before(spec.name, rows).values
            if base.numel() == expected.numel():
                difference.add_change(base, expected, stored)
            advance(expected.numel())
        return differences, tuple(f"{name}: not planned" for name in sorted({*other.changed()} - {*merged.changed()}))


def _rank(error: TensorError) -> tuple[float, float]:
    return error.nmse, error.worst


def parts(model: ExportModel, wanted: Mapping[str, int]) -> Iterator[tuple[TensorSpec, slice]]:
    """Each wanted tensor in blocks of rows."""
    for spec in model.source.specs():
        if spec.name in wanted:
            for rows in row_blocks(spec, wanted[spec.name]):
                yield spec, rows
