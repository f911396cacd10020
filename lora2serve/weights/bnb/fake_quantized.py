"""The round trip that a QLoRA base went through in training: quantized to 4 bits and back, row block by row block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from lora2serve.errors import CheckpointError
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.bnb import cuda_quantize
from lora2serve.weights.bnb.library import import_quietly
from lora2serve.weights.dequantize import DTYPE_NAMES, nibbles, scale_blocks
from lora2serve.weights.tensors import ALL, Block, DType, Source, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

MOST_KNOWN = 4  # weights whose absmax is kept: of experts, whose up and down lie in turns, and those before
TRAIN_AGAIN = "fold onto the original base (--merge-base original), or train again with train.quantize: nf4"


@dataclass(frozen=True)
class Quantization:
    """How the base was quantized in training: ``run.json``'s record of it, and where it happened."""

    modules: Sequence[str]  # those that bitsandbytes really replaced
    block: int  # weights that share an absmax
    double: bool  # the absmax quantized, too
    dtype: DType  # the type that the weights were loaded in before
    on_gpu: bool  # by CUDA kernels, which see some values on the other side of a border than those for a CPU
    experts: Sequence[str] = ()  # weights of the experts of a layer, each of these quantized by itself

    @classmethod
    def of(cls, record: JsonObject) -> Quantization:
        """From a run's record; CheckpointError where it was not nf4, which is what can be computed again."""
        quantization = record["quantization"]
        if quantization["type"] != "nf4":
            raise CheckpointError(f"quantized to {quantization['type']} in training, expected nf4", TRAIN_AGAIN)
        return cls(
            quantization["modules"],
            quantization["block_size"],
            quantization["double_quant"],
            DTYPE_NAMES[quantization["compute_dtype"]],
            record.get("device") == "cuda",
            quantization.get("experts", ()),
        )


class StoredNames(Protocol):
    """How a base calls what has other names in the model that was trained."""

    def stored_name(self, parameter: str) -> str | None:
        """The stored tensor that becomes ``parameter`` as it is; None where there is none."""

    def stored_experts(self, parameter: str) -> Sequence[Sequence[str]]:
        """The stored tensors that each expert of ``parameter`` is, or one list for all of them."""


class FakeQuantized:
    """A float base as bitsandbytes showed it to the adapter in training: quantized to 4 bits and back.

    A row block at a time; blocks of 64 stand alone, and the absmax, which double quantization treats as a whole, is
    computed for the whole weight first. What a CPU trained on is quantized by bitsandbytes itself; what a GPU trained
    on, as its CUDA kernels do. There, the mean of all absmax is summed in another order: the last bit of a weight may
    differ from the GPU's where the absmax was quantized, too.
    """

    def __init__(self, base: Source, how: Quantization, names: StoredNames | None = None) -> None:
        """``names``: of the base, where the model that was trained has others."""
        self.base, self.how = base, how
        self._by_name = {spec.name: spec for spec in base.specs()}
        self._stored: dict[str, list[str]] = {}  # of each quantized parameter, in the order of its values
        self._together: dict[str, Sequence[str]] = {}  # of each stored tensor, those quantized with it as one matrix
        for name in (f"{module}.weight" for module in how.modules):
            self._place(name, [[name if name in self._by_name or not names else names.stored_name(name) or ""]])
        for name in how.experts:
            self._place(name, names.stored_experts(name) if names else [[name]])
        missing = sorted({*(f"{module}.weight" for module in how.modules), *how.experts} - self._stored.keys())
        if missing:
            raise CheckpointError(
                f"{missing[0]}: quantized in training, but not in this base, or stored there as several tensors",
                "name the base of the training run; --merge-base original folds onto its own weights",
            )
        self._absmax: dict[str, Tensor] = {}
        self._lock = Lock()

    def _place(self, parameter: str, units: Sequence[Sequence[str]]) -> None:
        """Where a parameter is stored, if all of it is there."""
        stored = [name for unit in units for name in unit]
        if stored and all(name in self._by_name for name in stored):
            self._stored[parameter] = stored
            self._together |= {name: unit for unit in units for name in unit}

    def specs(self) -> Sequence[TensorSpec]:
        return self.base.specs()

    def read(self, name: str, rows: slice = ALL) -> Block:
        if name not in self._together:
            return self.base.read(name, rows)
        self._load_kernels()
        spec = self._by_name[name]
        start, stop, _ = rows.indices(spec.rows)
        aligned = self._aligned(spec, start, stop)
        codes, _ = self._quantize(self.base.read(name, aligned).values)
        values = self._dequantize(spec, codes, aligned)
        return Block(values[start - aligned.start : stop - aligned.start])

    def quantized(self, name: str) -> tuple[Tensor, Tensor]:
        """A whole weight as training held it: uint8 codes, two to a byte, and the float32 absmax of each block.

        ``name`` is that of the trained model's parameter.
        """
        import torch

        specs = [self._by_name[stored] for stored in self._stored[name]]
        codes = torch.cat([self._quantize(self.base.read(spec.name).values)[0].to(torch.uint8) for spec in specs])
        codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        return codes[::2] << 4 | codes[1::2], torch.cat([self._seen_absmax(spec) for spec in specs])

    def _load_kernels(self) -> None:
        """bitsandbytes, by one thread: its kernels register on import. Whoever only plans, needs none."""
        with self._lock:
            import_quietly()

    def _aligned(self, spec: TensorSpec, start: int, stop: int) -> slice:
        """Widen the rows until they begin and end at a block."""
        while start and start * spec.row_numel % self.how.block:
            start -= 1
        while stop < spec.rows and stop * spec.row_numel % self.how.block:
            stop += 1
        return slice(start, stop)

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One uint8 code a weight, and the float32 absmax of each block."""
        from bitsandbytes.functional import quantize_4bit

        rows = rows.to(torch_dtype(self.how.dtype))
        if self.how.on_gpu:
            return cuda_quantize.nf4(rows, self.how.block)
        packed, state = quantize_4bit(rows, blocksize=self.how.block, quant_type="nf4", compress_statistics=False)
        return nibbles(packed.flatten())[: rows.numel()], state.absmax

    def _dequantize(self, spec: TensorSpec, codes: Tensor, rows: slice) -> Tensor:
        # Not bitsandbytes' dequantize_4bit: its CPU kernel counts blocks from the start of each row, which is
        # another thing than the flat blocks of its own quantizer where a row is no multiple of the block.
        from bitsandbytes.functional import get_4bit_type

        first = rows.start * spec.row_numel // self.how.block
        absmax = self._seen_absmax(spec)[first : first - (-len(codes) // self.how.block)]
        values = get_4bit_type("nf4", device="cpu").index_select(0, codes.int())
        return scale_blocks(values, absmax, self.how.block).view(rows.stop - rows.start, *spec.shape[1:])

    def _seen_absmax(self, spec: TensorSpec) -> Tensor:
        """The weight's absmax as the dequantizer saw it: (blocks,) float32."""
        with self._lock:
            if spec.name not in self._absmax:
                while len(self._absmax) > MOST_KNOWN:  # blocks come in order: those before may still be at work
                    self._absmax.pop(next(iter(self._absmax)))
                self._absmax[spec.name] = self._compute_absmax(spec)
            return self._absmax[spec.name]

    def _compute_absmax(self, spec: TensorSpec) -> Tensor:
        import torch

        if len(together := self._together[spec.name]) == 1 or not self.how.double:
            return self._doubled(self._raw_absmax(spec), spec.rows if len(spec.shape) == 3 else 1)
        parts = [self._raw_absmax(self._by_name[name]) for name in together]
        first = sum(len(part) for part in parts[: together.index(spec.name)])
        return self._doubled(torch.cat(parts), 1)[first : first + spec.numel // self.how.block]

    def _raw_absmax(self, spec: TensorSpec) -> Tensor:
        """As it is, before it is quantized, too."""
        import torch

        whole = self.how.block // gcd(spec.row_numel, self.how.block)  # rows that are a number of blocks
        rows_each = max(1, (1 << 20) // max(1, spec.row_numel) // whole) * whole
        parts = []
        for start in range(0, spec.rows, rows_each):
            rows = self.base.read(spec.name, slice(start, min(start + rows_each, spec.rows))).values
            parts.append(self._quantize(rows)[1])
        return torch.cat(parts)

    def _doubled(self, absmax: Tensor, experts: int) -> Tensor:
        """With those of each expert quantized by themselves, where training did it."""
        import torch

        if not self.how.double:
            return absmax
        parts = absmax.view(experts, -1)
        return torch.cat([self._twice(part - part.mean()) + part.mean() for part in parts])

    def _twice(self, absmax: Tensor) -> Tensor:
        """Through 8 bits and back, in blocks of 256."""
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        if not self.how.on_gpu:
            rounded: Tensor = dequantize_blockwise(*quantize_blockwise(absmax, blocksize=256)).float()
            return rounded
        codes, scales = cuda_quantize.eight_bit(absmax, 256)
        return scale_blocks(cuda_quantize.dynamic_map().index_select(0, codes.int()), scales, 256)
