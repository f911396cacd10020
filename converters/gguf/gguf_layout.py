"""What a GGUF file consists of, before each tensor has its type: what a backend says of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from converters.gguf.header import Keys
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

MATRIX_TYPES = ("F16", "BF16")
NOT_QUANTIZED = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # float32 in every file


@dataclass(frozen=True)
class LayoutOptions:
    """What a layout depends on. ``pre``: the pre-tokenizer's name. ``match_reference``: round to the stored types and
    to f16 first, as the usual chain of merge, convert and quantize does. ``chat_template`` replaces the model's.
    """

    quant: str = "F16"
    pre: str | None = None
    match_reference: bool = False
    chat_template: str | None = field(default=None, metadata={"record": False})  # no choice of the user's


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of the file: its name and its shape, as llama.cpp counts rows (the last is a row's length).

    ``f16_type``: its type in an F16 file of llama.cpp's converter; None for the general rule. ``fixed``: no other type.
    """

    name: str
    shape: tuple[int, ...]
    f16_type: str | None = None
    fixed: bool = False

    @property
    def unquantized_type(self) -> str:
        """The type in a 16-bit or 32-bit file: that of the converter, else F16 for matrices and F32 for the rest."""
        if self.f16_type:
            return self.f16_type
        is_matrix = len(self.shape) > 1 and self.name.endswith(".weight") and not self.name.endswith(NOT_QUANTIZED)
        return "F16" if is_matrix else "F32"

    @property
    def is_matrix(self) -> bool:
        """Whether a preset chooses its type."""
        return self.unquantized_type in MATRIX_TYPES


class Backend(Protocol):
    """What one file consists of, and how stored rows become its rows. NativeBackend and UpstreamBackend are two."""

    architecture: str
    preset: str  # the --quant of this file
    tensors: Sequence[TensorLayout]
    wanted: Mapping[str, int]  # as a sink's

    def keys(self) -> Keys:
        """All metadata."""
        ...

    def targets(self, spec: TensorSpec, rows: slice, block: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(tensor, first row, values (n, ne0)) for each part of the file that a block of stored rows completes."""
        ...

    def constants(self) -> Iterator[tuple[str, Tensor | bytes]]:
        """Tensors that come from no stored one: values (n, ne0), or bytes in the file's own type."""
        ...

    def close(self) -> None:
        """Release what is held. Safe twice."""
        ...
