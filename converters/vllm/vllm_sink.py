"""A merged Hugging Face directory that ``vllm serve DIR`` loads with no flag."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from converters.safetensors import SHARD, SafetensorsReader
from converters.vllm.calibrated import CALIBRATED, AwqReader, CalibratedWriter
from converters.vllm.compressed.compressed_reader import CompressedReader
from converters.vllm.compressed.compressed_writer import CompressedWriter
from converters.vllm.compressed.schemes import SCHEMES
from converters.vllm.serve_config import generation_config, serve_yaml
from converters.vllm.weight_writer import PlainWriter, WeightWriter
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.staging import StagedDir
from lora2serve.exporting.sinks import Calibration, ExportFacts, ExportModel, Reader
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import FLOATS, Block, TensorSpec

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class VllmOptions:
    """``shard_size`` in bytes; ``quant`` a name of ``converters.vllm.compressed.schemes``, or None for plain weights.

    ``calibration`` is the data for ``awq`` and ``gptq``.
    """

    shard_size: int = SHARD
    quant: str | None = None
    calibration: Calibration | None = None


class VllmSink:
    """Merged weights in safetensors, plain or quantized; config, tokenizer, chat template and generation config."""

    Options: ClassVar[type[VllmOptions]] = VllmOptions
    quants: ClassVar[tuple[str, ...]] = (*SCHEMES, *CALIBRATED)
    default_quant: ClassVar[str | None] = None

    def __init__(self, model: ExportModel, out: StagedDir, options: VllmOptions) -> None:
        self._model, self._out = model, out
        specs = list(model.source.specs())
        self._dtype = _main_dtype(specs)
        self._weights = _open_writer(model, out, specs, options)
        self.wanted: Mapping[str, int] = self._weights.wanted

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        self._weights.write(spec, rows, block)

    def finish(self) -> ExportFacts:
        config = served_config(self._model.config, self._dtype)
        weights = self._weights.finish(config)
        quantization = weights.quantization_config
        if quantization is not None:
            config["quantization_config"] = quantization
        self._out.json("config.json", config)
        ends = generation_config(self._model)
        for name, path in self._model.files.items():
            if name != "generation_config.json" or ends is None:
                self._out.copy(name, path)
        if ends is not None:
            self._out.json("generation_config.json", ends)
        served = "bfloat16" if quantization and self._dtype == "float32" else self._dtype  # no kernel for it in float32
        self._out.text("serve.yaml", serve_yaml(self._model, served))
        use = f"vllm serve {shlex.quote(str(self._out.target))}"
        return ExportFacts(use=use, dtype=self._dtype, details=weights.facts)

    def close(self) -> None:
        self._weights.close()


def _open_writer(model: ExportModel, out: StagedDir, specs: Sequence[TensorSpec], options: VllmOptions) -> WeightWriter:
    if options.quant is None:
        return PlainWriter(out, specs, options.shard_size)
    if options.quant in CALIBRATED:
        return CalibratedWriter(model, out, specs, options.quant, options.calibration)
    return CompressedWriter(options.quant, specs, model.config, out, options.shard_size)


def open_reader(export: Path, manifest: Manifest, model: ExportModel) -> Reader:
    """The reader for an export, plain or quantized."""
    if manifest.quant == "awq":
        return AwqReader(export, manifest, model)
    if manifest.quant:
        return CompressedReader(export, manifest, model)
    return SafetensorsReader(export, manifest, model)


def served_config(config: JsonObject, dtype: str) -> dict[str, Any]:
    """``config.json`` of the merged model: plain weights in ``dtype``, under whichever key the base used for it."""
    served = {key: value for key, value in config.items() if key != "quantization_config"}
    served[_dtype_key(config)] = dtype
    for part, value in served.items():
        if part.endswith("_config") and isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            served[part] = {**value, _dtype_key(value): dtype}
    return served


def _dtype_key(config: JsonObject) -> str:
    return "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"


def _main_dtype(specs: list[TensorSpec]) -> str:
    sizes: dict[str, int] = {}
    for spec in specs:
        if spec.dtype in FLOATS:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.numel
    return DTYPES.get(max(sizes, key=lambda kind: sizes[kind], default="BF16"), "bfloat16")
