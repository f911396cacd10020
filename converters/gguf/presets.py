"""Which type each tensor of a preset gets: llama.cpp decides.

A shrunken copy of the planned file (its metadata but the vocabulary, its row lengths, two rows a tensor) goes through
``llama_model_quantize``, and the types are read back. Rules such as "the 70B gets better attention" then hold
because it is llama.cpp that applies them, and metadata that it would refuse is found before any work.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from converters.gguf import ggml, header
from converters.gguf.gguf_layout import TensorLayout
from converters.gguf.gguf_scan import scan
from converters.gguf.header import GgufTensor, Keys
from converters.gguf.imatrix import Imatrix, Matrix
from converters.gguf.llama.llama_process import Llama
from lora2serve.errors import ExportError
from lora2serve.system import scratch
from lora2serve.system.extras import install_hint

# --quant name -> llama.cpp's LLAMA_FTYPE number (include/llama.h)
PRESETS = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q4_K_M": 15, "Q4_K_S": 14,
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "Q2_K": 10, "IQ4_XS": 30,
    "IQ4_NL": 25, "MXFP4": 38, "IQ3_S": 26, "IQ3_M": 27, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ2_M": 29, "IQ2_S": 28,
    "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24,
}  # fmt: skip
PRESETS_THAT_NEED_IMATRIX = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
FLOAT_TYPES = ("F32", "F16", "BF16")
NUMPY_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # what gguf's numpy code makes where ggml's library is missing


def choose(
    preset: str, tensors: Sequence[TensorLayout], keys: Keys, llama: Llama, imatrix: Imatrix | None = None
) -> dict[str, str]:
    """Tensor -> type for a preset; ``keys`` is the file's metadata."""
    fixed = {tensor.name: tensor.unquantized_type for tensor in tensors if tensor.fixed}
    if preset in FLOAT_TYPES:
        return {tensor.name: preset if tensor.is_matrix else "F32" for tensor in tensors} | fixed
    if preset in NUMPY_TYPES and not llama.installed:
        return {tensor.name: _uniform(preset, tensor) for tensor in tensors} | fixed
    with scratch.temporary_folder("types") as folder:
        skeleton, answer = Path(folder) / "skeleton.gguf", Path(folder) / "answer.gguf"
        _write_skeleton(skeleton, tensors, keys)
        _quantize(llama, skeleton, answer, PRESETS[preset], _shrink(imatrix, tensors) if imatrix else None)
        return scan(answer) | fixed


def what_it_is(preset: str, tensors: Sequence[GgufTensor]) -> tuple[str, ...]:
    """A warning where a preset's own type is in none of the tensors: llama.cpp gives MXFP4 to experts only."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += prod(tensor.shape)
    if preset != "MXFP4" or preset in sizes:
        return ()
    ((most, _),) = sizes.most_common(1)
    return (f"--quant MXFP4: llama.cpp gives that type to experts only, and this model has none: it is {most}",)


def _uniform(preset: str, tensor: TensorLayout) -> str:
    """Without llama.cpp to ask: one type for every matrix, F16 where no whole blocks fit in a row."""
    if not tensor.is_matrix:
        return tensor.unquantized_type
    return preset if tensor.shape[-1] % ggml.block_size(preset)[0] == 0 else "F16"


def _write_skeleton(path: Path, tensors: Sequence[TensorLayout], keys: Keys) -> None:
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    # the vocabulary is most of the file, and no rule of a preset looks at it
    writer = header.open_writer(path, {key: value for key, value in keys.items() if not key.startswith("tokenizer.")})
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.unquantized_type]
        shape = tuple(min(2, length) for length in tensor.shape[:-1]) + tensor.shape[-1:]
        zeros = numpy.zeros(quant_shape_to_byte_shape(shape, kind), numpy.uint8)
        writer.add_tensor(tensor.name, zeros, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shrink(imatrix: Imatrix, tensors: Sequence[TensorLayout]) -> dict[str, Matrix]:
    """The matrix for the skeleton: of stacked experts there are two."""
    means = {tensor.name: imatrix.of(tensor.name, tensor.shape) for tensor in tensors if len(tensor.shape) > 1}
    return {name: values[:2] for name, values in means.items() if values is not None}


def require_imatrix(types: Mapping[str, str], imatrix: Imatrix | None) -> None:
    """The lowest types are nonsense without: ExportError names each tensor that has none (llama.cpp refuses too)."""
    missing = [
        name
        for name, kind in types.items()
        if kind in ggml.TYPES_THAT_NEED_IMATRIX
        and name not in ("token_embd.weight", "output.weight")
        and (imatrix is None or name not in imatrix.means)
    ]
    if missing:
        raise _without_matrix(missing)


def require_whole_blocks(types: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Rows hold whole blocks; ExportError names every tensor whose rows do not."""
    problems = [
        f"{name}: rows of {shapes[name][-1]} values, expected a multiple of {ggml.block_size(kind)[0]} for {kind}"
        for name, kind in types.items()
        if shapes[name][-1] % ggml.block_size(kind)[0]
    ]
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise ExportError("\n".join([*problems[:5], *more]), "name another type for them with --tensor-type")


def override(types: Mapping[str, str], overrides: Sequence[str]) -> dict[str, str]:
    """``pattern=TYPE`` over the preset's choice; a pattern that fits nothing is an error."""
    from gguf import GGMLQuantizationType

    result = dict(types)
    for text in overrides:
        pattern, _, kind = text.partition("=")
        name = kind.upper()
        if name not in GGMLQuantizationType.__members__:
            raise ExportError(f"--tensor-type {text}: unknown type {kind!r}", "such as attn_v=Q8_0")
        matching = [tensor for tensor in types if re.search(pattern, tensor)]
        if not matching:
            raise ExportError(f"--tensor-type {text}: no tensor matches", f"names look like {next(iter(types))}")
        result |= dict.fromkeys(matching, name)
    return result


def _quantize(llama: Llama, source: Path, out: Path, file_type: int, means: Mapping[str, Matrix] | None = None) -> None:
    if not llama.installed:
        raise ExportError(
            "mixed types need llama.cpp's library",
            f"{install_hint('gguf')}, or take one of {', '.join((*FLOAT_TYPES, *NUMPY_TYPES))}",
        )
    refusal = llama.quantize(source, out, file_type, means or None)
    without = re.search(r"Missing importance matrix for tensor (\S+)", refusal)
    if without:
        raise _without_matrix([without[1]])
    if refusal:
        raise ExportError(
            f"llama.cpp refuses the model's metadata: {refusal}",
            "please report this: it is a bug in the export",
        )


def _without_matrix(names: Sequence[str]) -> ExportError:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ExportError(
        f"no importance matrix for {', '.join(names[:5])}{more}",
        "make one for this model with --calibrate, or take a larger type",
    )
