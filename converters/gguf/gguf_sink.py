"""GGUF for llama.cpp, Ollama and LM Studio: from folded row blocks to a quantised file in one pass.

Plan, header, then blocks at their final offsets from any thread. Format: the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), written by the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from converters.gguf import import_gguf  # isort: skip  # noqa: F401 (before whatever imports gguf)
from converters.gguf import backends, imatrix, tokenizer_check
from converters.gguf.gguf_writer import GgufWriter
from converters.gguf.llama.llama_process import Llama
from converters.gguf.presets import NEEDS_IMATRIX, PRESETS
from lora2serve.artifacts.staging import StagedDir
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import Block, TensorSpec


@dataclass(frozen=True)
class GgufOptions:
    """``tensor_type``: ``pattern=TYPE`` over the preset. ``match_reference``: round to bf16 and f16 first, as the usual
    chain of merge, convert and quantise does. ``imatrix``: an importance matrix. ``split_size``: bytes of a file.
    ``chat_template`` replaces the model's in the file.
    """

    quant: str = "Q4_K_M"
    tensor_type: tuple[str, ...] = ()
    pre: str | None = None
    match_reference: bool = False
    imatrix: Path | None = None
    split_size: int | None = None
    chat_template: str | None = None


class GgufSink:
    """One GGUF file, or a split one; beside it that of the projector, where the model has other senses than text."""

    Options: ClassVar[type[GgufOptions]] = GgufOptions
    quants: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    default_quant: ClassVar[str | None] = "Q4_K_M"

    def __init__(self, model: ExportModel, out: StagedDir, options: GgufOptions) -> None:
        if options.quant in NEEDS_IMATRIX and options.imatrix is None:
            raise ExportError(
                f"--quant {options.quant} needs an importance matrix", "give --imatrix FILE or --calibrate DATA"
            )
        self._options = options
        with Llama() as llama, ExitStack() as stack:  # what was opened is closed where the rest is refused
            main, *others = self._layouts = backends.layouts(model, options)
            for layout in self._layouts:
                stack.callback(layout.close)
            shapes = {tensor.name: tensor.shape for tensor in main.tensors}
            matrix = imatrix.fit(imatrix.read(options.imatrix), shapes) if options.imatrix else None
            rounded = options.match_reference
            self._parts = [GgufWriter(main, llama, matrix, options.tensor_type, match_reference=rounded)]
            self._parts += [GgufWriter(layout, llama, None, match_reference=rounded) for layout in others]
            self.proof = tokenizer_check.prove(model, self._parts[0].write_empty, llama)
            self.files = self._parts[0].allocate(out, f"{model.name}-{options.quant}", options.split_size)
            self.projectors = [
                name
                for part in self._parts[1:]
                for name in part.allocate(out, f"mmproj-{model.name}-{part.layout.preset}")
            ]
            stack.pop_all()
        self.wanted: Mapping[str, int] = backends.together(part.layout.wanted for part in self._parts)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        for part in self._parts:
            part.write(spec, rows, block)

    def finish(self) -> Mapping[str, Any]:
        return {
            "architecture": self._layouts[0].architecture,
            "file": self.files[0],
            **({"projector": self.projectors[0]} if self.projectors else {}),
            "match_reference": self._options.match_reference,
            "tokens_proven": self.proof.ids,
        }

    def close(self) -> None:
        for layout in self._layouts:
            layout.close()
