"""Row blocks of plain weights in, row blocks of what compressed-tensors stores out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from converters.vllm.compressed.library import library, refuse_missing
from converters.vllm.compressed.schemes import SCHEMES, Scheme
from converters.vllm.compressed.selection import select
from converters.vllm.compressed.spool import Spool
from lora2serve.weights.tensors import Block, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

# Half way between 0, 0.5, 1, 1.5, 2, 3, 4 and 6. Ties go to the even code: down, up (so the largest float32 below),
# and so on.
FP4_BOUNDS = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)
Write = Callable[[str, slice, Block], None]


class Quantizer:
    """One scheme on one model. ``specs`` is what it stores; the blocks go out by ``write``.

    A scale needs the rows it spans, no more, and ``wanted`` says how many. Only nvfp4 has a scale over whole tensors,
    and one over all that vLLM fuses (q, k and v; gate and up): its blocks wait on the disk, as they came, until the
    last one of them is in. So each weight is still read and folded once, and memory stays a few blocks.
    """

    def __init__(self, quant: str, specs: Sequence[TensorSpec], config: Mapping[str, Any], folder: Path) -> None:
        refuse_missing()
        self._selection = select(specs, config, SCHEMES[quant])
        self.scheme = self._selection.scheme
        self._tensors = {name: self.scheme.tensors(spec) for name, spec in self._selection.weights.items()}
        self.specs = [
            stored for spec in specs for stored in (self._tensors[spec.name].values() if spec.name in self else [spec])
        ]
        self.wanted = {spec.name: self.scheme.rows if spec.name in self else 1 for spec in specs}
        self._spool = Spool(self._selection.fused, self._selection.weights, folder) if self.scheme.shared else None
        self._args: Any = None
        self._lock = Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._selection.weights

    def write(self, name: str, rows: slice, values: Tensor, write: Write) -> None:
        """Rows of a weight to quantise, float32 or the type of the model."""
        if self._spool is None:
            self._put(name, rows, values, None, write)
            return
        complete = self._spool.add(name, rows, values)
        if complete is None:
            return
        factor = library().global_scale(*complete.range())
        for part, at, waiting in complete.blocks():
            self._put(part, at, waiting, factor, write)

    def config(self) -> dict[str, Any]:
        """``quantization_config`` for config.json, as llm-compressor writes it."""
        found = library()
        described = found.config(
            config_groups={"group_0": self._scheme()},
            format=self.scheme.format,
            quantization_status="compressed",
            ignore=list(self._selection.ignore),
        )
        dumped = described.model_dump(mode="json", exclude={"quant_method"})
        about = {"version": found.version, "quant_method": "compressed-tensors"}
        return {**about, "sparsity_config": {}, "transform_config": {}, **dumped}

    def about(self) -> dict[str, Any]:
        """For the manifest."""
        kept = [name for name in self.wanted if name not in self]
        return {"format": self.scheme.format, "quantized": len(self._tensors), "kept": len(kept)}

    def close(self) -> None:
        """Remove what waits on the disk. Safe twice."""
        if self._spool is not None:
            self._spool.close()

    def _put(self, name: str, rows: slice, values: Tensor, factor: Tensor | None, write: Write) -> None:
        import torch

        specs = self._tensors[name]
        state = compress(values, self._scheme(), self.scheme, specs["weight_scale"], factor)
        scaled = slice(rows.start // self.scheme.rows, -(-rows.stop // self.scheme.rows))
        write(specs[self.scheme.weight].name, rows, Block(state[self.scheme.weight]))
        write(specs["weight_scale"].name, scaled, Block(state["weight_scale"]))
        if rows.start == 0 and factor is not None:
            write(specs["weight_global_scale"].name, slice(0, 1), Block(factor))
        if rows.start == 0 and self.scheme.shape:
            shape = torch.tensor(self._selection.weights[name].shape)
            write(specs["weight_shape"].name, slice(0, 2), Block(shape))

    def _scheme(self) -> Any:
        """The library's scheme, as it fits this model."""
        with self._lock:
            if self._args is None:
                self._args = library().preset(self.scheme.preset, ["Linear"])
                self._args.format = self.scheme.format
                if self.scheme.finer:
                    self._args.weights.group_size = self.scheme.group
            return self._args


def compress(
    values: Tensor, how: Any, scheme: Scheme, scale: TensorSpec, factor: Tensor | None = None
) -> dict[str, Tensor]:
    """Rows of a weight, quantised in float32 by the scale that is stored, which is rounded first.

    ``how`` is the library's scheme; the result has the library's names. (rows, in) -> (rows, ...).
    """
    import torch

    found = library()
    weight = values.float()
    low, high = _range(weight, scheme)
    scales, _ = found.qparams(low, high, how.weights, global_scale=factor)
    if scheme.scale is None:
        scales = scales.to(torch_dtype(scale.dtype))
        scales[scales == 0] = torch.finfo(scales.dtype).tiny  # too small for the type: such rows become zero
    if scheme.weight == "weight":
        return {"weight": _round(weight, scales, how.weights, scheme), "weight_scale": scales}
    compressor = found.compressors.get_value_from_registry(scheme.format)
    if scheme.dtype == "U8":
        packed = _pack_fp4(weight, scales if factor is None else scales / factor, scheme)
        return {scheme.weight: packed, "weight_scale": compressor._compress_scale(scales, how.weights)}
    compressed: dict[str, Tensor] = compressor.compress({"weight": weight, "weight_scale": scales}, how)
    return compressed


def _round(weight: Tensor, scales: Tensor, args: Any, scheme: Scheme) -> Tensor:
    """What the library's compressor does for types of a whole byte, without its way back to float32 and there again."""
    found = library()
    tiled = _tiles(weight, scheme)
    scaled = tiled / (scales[:, None, :, None] if scheme.group else scales)
    limits = found.limits(args, weight.device)
    rounded: Tensor = found.rounded(scaled, args, *limits, cast_to_original_dtype=False).to(args.pytorch_dtype())
    if scheme.group:
        rounded = rounded.view(rounded.shape[0] * scheme.rows, -1)[: weight.shape[0], : weight.shape[1]]
    return rounded


def _pack_fp4(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Two values of E2M1 in a byte, the first one low: the library's bytes, in a fraction of its time on a CPU."""
    import torch

    scaled = (_tiles(weight, scheme) / scales[:, None, :, None]).flatten(1)
    codes = (scaled < 0).to(torch.uint8) << 3
    scaled.abs_()
    for bound in FP4_BOUNDS:
        codes += scaled > bound
    return codes[:, ::2] | codes[:, 1::2] << 4


def _range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Lowest and highest of what shares a scale, by itself: each (rows, 1), (rows, groups) or (blocks, blocks)."""
    tiles = _tiles(weight, scheme)
    if not scheme.group:
        return tiles.amin(1, keepdim=True), tiles.amax(1, keepdim=True)
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def _tiles(weight: Tensor, scheme: Scheme) -> Tensor:
    """(rows, in) where a row has one scale, else (blocks of rows, rows, groups, columns), padded with zeros."""
    if not scheme.group:
        return weight
    if scheme.rows > 1:
        weight = library().pad(weight, (scheme.rows, scheme.group))
    return weight.view(len(weight) // scheme.rows, scheme.rows, -1, scheme.group)
