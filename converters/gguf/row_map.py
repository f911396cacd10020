"""Which outputs of a linear module lie in which rows of a GGUF tensor: what follows the weights must follow this.

The tables of our own families say it. What llama.cpp's converter computes, such as the rows of a fused projection in
another order, is found by probing: it gets a matrix that holds its own row numbers, and one of its column numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.gguf import backends
from converters.gguf.native import architectures, native_layout
from converters.gguf.native.native_layout import Placement
from converters.gguf.upstream.upstream_backend import UpstreamBackend
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

PROBE_TOLERANCE = 0.1  # a probe's numbers are whole, but for the rounding of what they were added to


@dataclass(frozen=True)
class RowMap:
    """``outputs``: (rows of the GGUF tensor,) int64, the module's output in each; -1 where it is another module's.

    ``inputs``: (columns,) int64, the module's input in each column; None where they are in their order.
    """

    target: str
    outputs: Tensor
    transposed: bool = False  # stored as (in, out)
    inputs: Tensor | None = None


class RowMaps:
    """Of one model. A context manager: leaving it ends llama.cpp's converter, where that was asked."""

    def __init__(self, model: ExportModel) -> None:
        self._specs = {spec.name: spec for spec in model.source.specs()}
        self._upstream: UpstreamBackend | None = None
        self._placements: Mapping[str, Sequence[Placement]]
        config = architectures.text_config(model.config)
        if backends.is_native(model):
            family = architectures.find(config)
            self.architecture = family.name
            self._placements = native_layout.place_tensors(list(self._specs.values()), config, family)
        else:
            self._upstream = backends.upstream(model)
            self.architecture = self._upstream.architecture
            self._placements = self._upstream.placements

    def __enter__(self) -> RowMaps:
        return self

    def __exit__(self, *error: object) -> None:
        if self._upstream is not None:
            self._upstream.close()

    def of(self, name: str) -> list[RowMap]:
        """Of one stored weight; none where it has no place in the GGUF, or no rows and columns of its own there."""
        spec = self._specs.get(name)
        if spec is None or len(spec.shape) != 2:
            return []
        placements = self._placements.get(name, ())
        if all(_keeps_rows(placement, spec) for placement in placements):
            return [_read_off(placement, spec) for placement in placements] or self._probed(spec)
        return []

    def placed(self, name: str) -> Sequence[Placement]:
        """Where a stored tensor goes, by our own tables; nothing where llama.cpp's converter computes it."""
        return () if self._upstream is not None else self._placements.get(name, ())

    def _probed(self, spec: TensorSpec) -> list[RowMap]:
        """All of its maps, or none where an output is nowhere: half an adapter would answer, and wrongly."""
        row_maps = list(self._probe(spec))
        outputs = {output for row_map in row_maps for output in row_map.outputs.tolist()} - {-1}
        whole = row_maps and len(outputs) == spec.shape[1 if row_maps[0].transposed else 0]
        return row_maps if whole else []

    def _probe(self, spec: TensorSpec) -> Iterator[RowMap]:
        import torch

        if self._upstream is None or spec.name not in self._upstream.wanted:
            return
        rows, columns = (torch.arange(length, dtype=torch.float32) for length in spec.shape)
        zero = self._answers(spec, torch.zeros(spec.shape))
        by_row = self._answers(spec, rows[:, None].expand(spec.shape), zero)
        by_column = self._answers(spec, columns.expand(spec.shape), zero)
        ones = self._answers(spec, torch.ones(spec.shape), zero)
        for target, weights in ones.items():
            own = weights.amax(dim=1) > 0.5
            straight = _orders(by_row[target], by_column[target], weights, own, columns)
            transposed = _orders(by_column[target], by_row[target], weights, own, rows)
            if straight is not None:
                yield RowMap(target, straight[0], inputs=straight[1])
            elif transposed is not None:
                yield RowMap(target, transposed[0], True, transposed[1])

    def _answers(self, spec: TensorSpec, probe: Tensor, before: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What becomes of a matrix: target -> (rows, columns), less what was there ``before``."""
        assert self._upstream is not None
        parts = self._upstream.targets(spec, slice(0, spec.rows), probe.contiguous())
        return {name: values - before[name] if before else values for name, _, values in parts}


def _keeps_rows(placement: Placement, spec: TensorSpec) -> bool:
    rearranged = placement.half is not None or placement.transposed
    return not rearranged and len(placement.shape) == 2 and placement.shape[-1] == spec.shape[-1]


def _read_off(placement: Placement, spec: TensorSpec) -> RowMap:
    import torch

    order = torch.arange(spec.rows)
    if placement.head_rows:
        order = native_layout.permute(order[:, None], placement.head_rows).flatten()
    outputs = torch.full((placement.shape[0],), -1)
    outputs[placement.first : placement.first + spec.rows] = order
    return RowMap(placement.target, outputs)


def _orders(
    outputs: Tensor, inputs: Tensor, weights: Tensor, own: Tensor, expected: Tensor
) -> tuple[Tensor, Tensor | None] | None:
    """The output in each row that is the module's own, and the input in each column where they are in another order;
    None where a value is scaled, or an input is not in one column alone.
    """
    import torch

    if outputs.shape[1] != len(expected) or not bool(own.any()):
        return None
    first, order = outputs[:, :1].round(), inputs[own][0].round()
    errors = [(outputs - first)[own], (inputs - order)[own], (weights - 1)[own], weights[~own]]
    wrong = any(float(error.abs().max()) > PROBE_TOLERANCE for error in errors if error.numel())
    if wrong or not torch.equal(order.sort().values, expected):
        return None
    rows = torch.where(own, first[:, 0], -1.0).long()
    return rows, None if torch.equal(order, expected) else order.long()
