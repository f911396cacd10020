"""The narrow waist: a model is a read-only mapping from names to tensors that exist while you look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from torch import Tensor, dtype

# The dtype names of the safetensors format that hold whole bytes.
DType = Literal[
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0",
    "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
]  # fmt: skip
DTYPES: tuple[DType, ...] = get_args(DType)
FLOATS: frozenset[DType] = frozenset({"F64", "F32", "F16", "BF16"})

ALL = slice(None)
BLOCK = 1 << 18  # elements in one block, 1 MiB in float32: 2^19 takes 20 MB more, and is no faster beyond noise


def itemsize(dtype: DType) -> int:
    """Bytes per element."""
    if dtype in ("F64", "I64", "U64"):
        return 8
    if dtype in ("F32", "I32", "U32"):
        return 4
    return 2 if dtype in ("F16", "BF16", "I16", "U16") else 1


def torch_dtype(dtype: DType) -> dtype:
    """The torch dtype of that name."""
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    }  # fmt: skip
    named = getattr(torch, names[dtype])
    assert isinstance(named, torch.dtype)
    return named


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without reading it.

    ``dtype`` is the type the tensor is to be *stored* in. A ``Block`` may hold float32 where the values were
    computed and not yet rounded: the sink rounds, once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    whole: bool = field(default=False, compare=False)  # any of its rows costs as much to read as all of them

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_numel(self) -> int:
        """Elements in one row."""
        return prod(self.shape[1:])

    @property
    def numel(self) -> int:
        """Elements in all."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in all, in ``dtype``."""
        return self.numel * itemsize(self.dtype)


def row_blocks(spec: TensorSpec, unit: int = 1) -> Iterator[slice]:
    """Row blocks of one tensor: each as large as ``unit`` rows need and about ``BLOCK`` elements otherwise."""
    unit = max(1, spec.rows) if spec.whole else unit
    step = max(unit, BLOCK // max(1, spec.row_numel) // unit * unit)
    for start in range(0, spec.rows, step):
        yield slice(start, min(start + step, spec.rows))


@dataclass(frozen=True)
class Block:
    """Rows of one tensor, contiguous on the CPU; nobody changes them.

    ``values`` are float32 where they were computed and not yet rounded, else of the type that the tensor is stored
    in. ``rounded`` are the same rows in that type, where the rounding is done already and every value is finite: so
    that a block is rounded and looked at once.
    """

    values: Tensor
    rounded: Tensor | None = None

    def in_dtype(self, dtype: DType) -> Tensor | None:
        """The rows in that type, where they are known in it."""
        wanted = torch_dtype(dtype)
        known = (self.values, self.rounded)
        return next((rows for rows in known if rows is not None and rows.dtype == wanted), None)

    def __getitem__(self, rows: slice) -> Block:
        """Some of the rows."""
        rounded = None if self.rounded is None else self.rounded[rows].contiguous()
        return Block(self.values[rows].contiguous(), rounded)


def all_finite(block: Tensor) -> bool:
    """Whether every value is finite. A sum says so in one pass; only one that is not is looked at in full."""
    import torch

    total = block.sum(dtype=torch.float32 if block.element_size() < 8 else torch.float64)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(block).all())


class Source(Protocol):
    """A model, read by rows. Checkpoint, Dequantized and Merged each wrap the one before."""

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, in file order, so that reads stay sequential."""
        ...

    def read(self, name: str, rows: slice = ALL) -> Block:
        """Rows ``[start, stop)`` of one tensor: fresh memory, shape ``(stop - start, *shape[1:])``.

        A scalar is read whole. Safe from several threads.
        """
        ...
