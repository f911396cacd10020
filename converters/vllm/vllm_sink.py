"""A merged Hugging Face directory that ``vllm serve DIR`` loads with no flag."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from lora2serve.artifacts.staging import DryRunDir, StagedDir, as_json
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.exporting.sinks import Calibration, ExportFacts, ExportModel, Reader
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.checkpoint import INDEX
from lora2serve.weights.tensors import FLOATS, Block, TensorSpec

BY_COMPRESSOR = {
    "config.json:quantization_config*": "written by llm-compressor",
    "model*.safetensors*": "written by llm-compressor",
}
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class VllmOptions:
    """``shard_size`` in bytes; ``quant`` a name of ``converters.vllm.compressed.schemes``, or None for plain weights.

    ``calibration`` is the data for ``awq``, ``gptq`` and ``nvfp4-w4a4``.
    """

    shard_size: int = SHARD
    quant: str | None = None
    calibration: Calibration | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether activations on data decide what is written."""
        return self.quant in CALIBRATED


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

    @staticmethod
    def needs_whole_model(options: VllmOptions) -> bool:
        """Whether what is stored of one tensor depends on others: then several workers cannot write it."""
        return options.is_calibrated or (options.quant is not None and SCHEMES[options.quant].shared)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        self._weights.write(spec, rows, block)

    def finish(self) -> ExportFacts:
        weights = self._weights.finish(served_config(self._model.config, self._dtype))
        for name, content in side_files(self._model, self._dtype, weights.quantization_config).items():
            self._out.bytes(name, content)
        use = f"vllm serve {shlex.quote(str(self._out.target))}"
        return ExportFacts(use=use, dtype=self._dtype, details=weights.facts)

    def close(self) -> None:
        self._weights.close()


def side_files(model: ExportModel, dtype: str, quantization: JsonObject | None) -> dict[str, bytes]:
    """All that lies beside the weights: file name -> content."""
    config = served_config(model.config, dtype)
    if quantization is not None:
        config["quantization_config"] = quantization
    ends = generation_config(model)
    files = {"config.json": as_json(config)}
    files |= {name: path.read_bytes() for name, path in model.files.items()}
    if ends is not None:
        files["generation_config.json"] = as_json(ends)
    served = "bfloat16" if quantization and dtype == "float32" else dtype  # no kernel for it in float32
    return files | {"serve.yaml": serve_yaml(model, served).encode()}


def plan_settings(model: ExportModel, options: VllmOptions) -> PlannedSettings:
    """Of what llm-compressor quantizes, its entry in the config and the names of its files are its own."""
    specs = list(model.source.specs())
    calibrated = options.is_calibrated
    out, dtype = DryRunDir(Path("planned")), _main_dtype(specs)
    try:
        writer = _open_writer(model, out, specs, replace(options, quant=_like(options.quant)))
        weights = writer.finish(model.config)
        writer.close()
        index = {INDEX: (out.path / INDEX).read_bytes()} if (out.path / INDEX).is_file() else {}
    finally:
        out.discard()
    return PlannedSettings(
        side_files(model, dtype, weights.quantization_config) | ({} if calibrated else index),
        weights=() if calibrated else tuple(out.sizes),
        facts=ExportFacts(dtype=dtype),
        unplanned=BY_COMPRESSOR if calibrated else {},
    )


def _like(quant: str | None) -> str | None:
    """The scheme itself, or the data-free one with the same layout."""
    return CALIBRATED.get(quant or "", quant)


def _open_writer(model: ExportModel, out: StagedDir, specs: Sequence[TensorSpec], options: VllmOptions) -> WeightWriter:
    if options.quant is None:
        return PlainWriter(out, specs, options.shard_size)
    if options.is_calibrated:
        if isinstance(out, DryRunDir):  # llm-compressor's files are as large as those of the same layout
            CompressedWriter(CALIBRATED[options.quant], specs, model.config, out, options.shard_size).close()
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
