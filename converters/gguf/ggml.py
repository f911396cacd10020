"""ggml's own quantizer, by ctypes out of llama-cpp-python's library; gguf's numpy code where it is missing.

A failed assertion inside ggml ends the process, so every argument is checked here first.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.errors import ExportError
from lora2serve.system.extras import install_hint
from lora2serve.weights.tensors import all_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TYPES_THAT_NEED_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


def type_number(name: str) -> int:
    """ggml's number of a type such as ``Q4_K``."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[name].value)


def block_size(name: str) -> tuple[int, int]:
    """(elements, bytes) of one block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return int(elements), int(size)


def row_bytes(name: str, columns: int) -> int:
    """Bytes of one row of ``columns`` elements; the type's block must divide it."""
    elements, size = block_size(name)
    if columns % elements:
        raise ExportError(f"rows of {columns} elements, expected a multiple of {elements} for {name}")
    return columns // elements * size


def encode(block: Tensor, name: str, importance: NDArray[np.float32] | None = None) -> memoryview:
    """Rows of float32 (n, columns) as bytes of that type; each row stands alone, so any rows may come together."""
    import torch

    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name in floats:
        stored = block.to(floats[name])
        if name == "F16" and not all_finite(stored):
            raise ExportError(f"{float(block.abs().max()):.4g} does not fit F16 (65504 at most)", "use --quant BF16")
        return stored.contiguous().flatten().view(torch.uint8).numpy().data
    rows = block.to(torch.float32).contiguous()
    size = row_bytes(name, rows.shape[-1])
    if name in TYPES_THAT_NEED_IMATRIX and importance is None:
        raise ExportError(f"{name} needs an importance matrix", "give --imatrix FILE or --calibrate DATA")
    library = ggml()
    if library is None:
        return _encode_by_gguf(rows, name)
    out = torch.empty(rows.numel() // rows.shape[-1] * size, dtype=torch.uint8)
    weights = None if importance is None else importance.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    count = rows.numel() // rows.shape[-1]
    written = library.ggml_quantize_chunk(
        type_number(name), rows.data_ptr(), out.data_ptr(), 0, count, rows.shape[-1], weights
    )
    if written != out.numel():
        raise ExportError(f"ggml wrote {written} bytes of {name}, expected {out.numel()}")
    return out.numpy().data


def prepare(names: set[str]) -> None:
    """Build ggml's tables for these types once, before several threads need them."""
    library = ggml()
    for name in names:
        if library is not None:
            library.ggml_quantize_init(type_number(name))


@lru_cache(maxsize=1)
def ggml() -> ctypes.CDLL | None:
    """libggml-base, or None where llama-cpp-python is not installed."""
    package = find_spec("llama_cpp")
    if package is None or package.origin is None:
        return None
    files = sorted((Path(package.origin).parent / "lib").glob("libggml-base.*"))
    if not files:
        return None
    library = ctypes.CDLL(str(files[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.POINTER(ctypes.c_float),
    ]  # fmt: skip
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def _encode_by_gguf(rows: Tensor, name: str) -> memoryview:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    try:
        return memoryview(quantize(rows.numpy(), GGMLQuantizationType[name]).tobytes())
    except NotImplementedError:
        raise ExportError(f"{name} needs ggml's own quantizer", install_hint("gguf")) from None
