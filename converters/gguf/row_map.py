"""Which outputs of a linear module lie in which rows of a GGUF tensor: what follows the weights must follow this.

The tables of our own families say it. What llama.cpp's converter computes, such as the rows of a fused projection in
another order, is found by probing: it gets a matrix that holds its own row numbers, and one of its column numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.gguf import backends
from converters.gguf.native import architectures, native_layout
from converters.gguf.native.native_layout import Place
from converters.gguf.upstream.upstream_backend import Upstream
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 0.1  # a probe's numbers are whole, but for the rounding of what they were added to


@dataclass(frozen=True)
class RowMap:
    """``outputs``: (rows of the GGUF tensor,) int64, the module's output in each; -1 where it is another module's.

    The columns are the module's inputs, in their order.
    """

    target: str
    outputs: Tensor
    turned: bool = False  # stored as (in, out)


class RowMaps:
    """Of one model. A context manager: leaving it ends llama.cpp's converter, where that was asked."""

    def __init__(self, model: ExportModel) -> None:
        self._specs = {spec.name: spec for spec in model.source.specs()}
        self._upstream: Upstream | None = None
        config = architectures.text_config(model.config)
        if backends.is_native(model):
            family = architectures.find(config)
            self.architecture = family.name
            self._places: Any = native_layout.lay_out(list(self._specs.values()), config, family)
        else:
            self._upstream = backends.upstream(model)
            self.architecture = self._upstream.architecture
            self._places = self._upstream.places

    def __enter__(self) -> RowMaps:
        return self

    def __exit__(self, *error: object) -> None:
        if self._upstream is not None:
            self._upstream.close()

    def of(self, name: str) -> list[RowMap]:
        """Of one stored weight; none where it has no place in the GGUF, or lies there otherwise than row by row."""
        spec = self._specs.get(name)
        if spec is None or len(spec.shape) != 2:
            return []
        places = self._places.get(name, ())
        if all(_is_plain(place, spec) for place in places):
            return [_moved(place, spec) for place in places] or self._probed(spec)
        return []

    def _probed(self, spec: TensorSpec) -> list[RowMap]:
        """All of its moves, or none where an output is nowhere: half an adapter would answer, and wrongly."""
        found = list(self._probe(spec))
        there = {output for move in found for output in move.outputs.tolist()} - {-1}
        return found if found and len(there) == spec.shape[1 if found[0].turned else 0] else []

    def _probe(self, spec: TensorSpec) -> Iterator[RowMap]:
        import torch

        if self._upstream is None or spec.name not in self._upstream.wanted:
            return
        rows, columns = (torch.arange(length, dtype=torch.float32) for length in spec.shape)
        zero = self._answers(spec, torch.zeros(spec.shape))
        by_row = self._answers(spec, rows[:, None].expand(spec.shape), zero)
        by_column = self._answers(spec, columns.expand(spec.shape), zero)
        ones = self._answers(spec, torch.ones(spec.shape), zero)
        for target, ours in ones.items():
            mine = ours.amax(dim=1) > 0.5
            straight = _read(by_row[target], by_column[target], ours, mine, columns)
            turned = _read(by_column[target], by_row[target], ours, mine, rows)
            if straight is not None:
                yield RowMap(target, straight)
            elif turned is not None:
                yield RowMap(target, turned, turned=True)

    def _answers(self, spec: TensorSpec, probe: Tensor, before: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What becomes of a matrix: target -> (rows, columns), less what was there ``before``."""
        assert self._upstream is not None
        found = self._upstream.targets(spec, slice(0, spec.rows), probe.contiguous())
        return {name: values - before[name] if before else values for name, _, values in found}


def _is_plain(place: Place, spec: TensorSpec) -> bool:
    turned = place.half is not None or place.transposed
    return not turned and len(place.shape) == 2 and place.shape[-1] == spec.shape[-1]


def _moved(place: Place, spec: TensorSpec) -> RowMap:
    import torch

    order = torch.arange(spec.rows)
    if place.heads:
        order = native_layout.permute(order[:, None], place.heads).flatten()
    outputs = torch.full((place.shape[0],), -1)
    outputs[place.first : place.first + spec.rows] = order
    return RowMap(place.target, outputs)


def _read(outputs: Tensor, inputs: Tensor, ours: Tensor, mine: Tensor, expected: Tensor) -> Tensor | None:
    """The output in each row that is ours, if it is one, unscaled, with every input in its place."""
    import torch

    if outputs.shape[1] != len(expected):
        return None
    first = outputs[:, :1].round()
    sound = [(outputs - first)[mine], (inputs - expected)[mine], (ours - 1)[mine], ours[~mine]]
    if any(float(part.abs().max()) > NEAR for part in sound if part.numel()):
        return None
    return torch.where(mine, first[:, 0], -1.0).long()
