"""GGUF for llama.cpp, Ollama and LM Studio: from folded row blocks to a quantized file in one pass.

Plan, header, then blocks at their final offsets from any thread. Format: the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), written by the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from converters.gguf import backends, imatrix, tokenizer_check
from converters.gguf.gguf_layout import LayoutOptions
from converters.gguf.gguf_plan import plan_file
from converters.gguf.gguf_writer import GgufWriter
from converters.gguf.llama.llama_process import Llama
from converters.gguf.presets import PRESETS, PRESETS_THAT_NEED_IMATRIX, what_it_is
from converters.gguf.shards import ShardFiles, projector_stem, stem
from lora2serve.artifacts.staging import StagedDir
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportFacts, ExportModel
from lora2serve.system.small_files import digest
from lora2serve.weights.tensors import Block, TensorSpec


@dataclass(frozen=True)
class GgufOptions(LayoutOptions):
    """``tensor_type``: ``pattern=TYPE`` over the preset. ``imatrix``: an importance matrix. ``split_size``: bytes of a
    file.
    """

    quant: str = "Q4_K_M"
    tensor_type: tuple[str, ...] = ()
    imatrix: Path | None = None
    split_size: int | None = None


class GgufSink:
    """One GGUF file, or a split one; beside it that of the projector, where the model has other senses than text."""

    Options: ClassVar[type[GgufOptions]] = GgufOptions
    quants: ClassVar[tuple[str, ...]] = tuple(PRESETS)
    default_quant: ClassVar[str | None] = "Q4_K_M"

    def __init__(self, model: ExportModel, out: StagedDir, options: GgufOptions) -> None:
        if options.quant in PRESETS_THAT_NEED_IMATRIX and options.imatrix is None:
            raise ExportError(
                f"--quant {options.quant} needs an importance matrix", "give --imatrix FILE or --calibrate DATA"
            )
        self._match_reference = options.match_reference
        with Llama() as llama, ExitStack() as stack:  # what was opened is closed where the rest is refused
            main, *projectors = self._backends = backends.open_backends(model, options)
            for backend in self._backends:
                stack.callback(backend.close)
            backends.refuse_lost(model, self._backends)
            shapes = {tensor.name: tensor.shape for tensor in main.tensors}
            matrix = imatrix.fit(imatrix.read(options.imatrix), shapes) if options.imatrix else None
            self._details = {"imatrix": _on_record(options.imatrix)} if options.imatrix else {}
            plan, *others = [
                plan_file(main, llama, matrix, options.tensor_type),
                *(plan_file(projector, llama) for projector in projectors),
            ]
            self._warnings = what_it_is(options.quant, plan.tensors)
            self.tokens = tokenizer_check.check(model, plan, llama)
            if not self.tokens.stops:
                plan = tokenizer_check.ending(model, plan)
            files = ShardFiles(out, stem(model.name, options.quant), plan, options.split_size)
            self._writers = [GgufWriter(main, plan, files, matrix, match_reference=options.match_reference)]
            for projector, other in zip(projectors, others, strict=True):
                files = ShardFiles(out, projector_stem(model.name, projector.preset), other)
                self._writers.append(GgufWriter(projector, other, files, None, match_reference=options.match_reference))
            self.files, *beside = [writer.files.names for writer in self._writers]
            self.projectors = [name for names in beside for name in names]
            stack.pop_all()
        self.architecture = main.architecture
        self.wanted: Mapping[str, int] = backends.rows_at_once(backend.wanted for backend in self._backends)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        for writer in self._writers:
            writer.write(spec, rows, block)

    def finish(self) -> ExportFacts:
        return ExportFacts(
            architecture=self.architecture,
            file=self.files[0],
            projector=self.projectors[0] if self.projectors else None,
            match_reference=self._match_reference,
            tokens_proven=self.tokens.compared,
            details=self._details,
            warnings=self._warnings,
        )

    def close(self) -> None:
        for backend in self._backends:
            backend.close()


def _on_record(imatrix: Path) -> dict[str, str]:
    """Where the matrix was, and which it was: parity makes the file again with it."""
    return {"path": str(imatrix.resolve()), "sha256": str(digest(imatrix)["sha256"])}
