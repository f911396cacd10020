"""AWQ, GPTQ and NVFP4 with its activations: llm-compressor quantizes the merged 16-bit model in a child.

All of it happens inside the export's unpublished directory: the 16-bit model, written by the one pass, in ``merged``,
which goes again, and the product beside it. AWQ moves scales between a layer and the one before it, so the product's
norms are not the model's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.safetensors import ShardWriter
from converters.vllm.compressed.compressed_reader import CompressedReader
from converters.vllm.compressed.schemes import SCHEMES
from converters.vllm.compressed.selection import DECODER_LAYER, Selection, select
from converters.vllm.weight_writer import WrittenWeights
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.staging import StagedDir
from lora2serve.errors import EngineError, ExportError
from lora2serve.exporting.sinks import Calibration, ExportModel
from lora2serve.system import scratch, tool_env
from lora2serve.system.small_files import JsonObject
from lora2serve.system.worker_process import WorkerProcess
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.tensors import Block, TensorSpec

# --quant -> the data-free scheme with the same layout of weights: what fits it, and which group
CALIBRATED = {"awq": "w4a16", "gptq": "w4a16", "nvfp4-w4a4": "nvfp4"}
ROWS = 512  # of the calibration data, at most; llm-compressor's own default
WORKER = f"{Path(__file__).with_name('calibrated_child.py')}:CompressorWorker"
PACKED = re.compile(r"(weight_(packed|scale|global_scale|zero_point|shape|g_idx)|input_global_scale)$")


class CalibratedWriter:
    """Takes the merged tensors; ``finish`` leaves the quantized ones in ``out``."""

    def __init__(
        self, model: ExportModel, out: StagedDir, specs: Sequence[TensorSpec], quant: str, data: Calibration | None
    ) -> None:
        self._python = tool_env.require()
        if data is None:
            raise ExportError(f"--quant {quant} needs calibration data", "name a file with --calibrate")
        self._selection = _select(specs, model, quant)
        self._model, self._out, self._specs, self._quant, self._data = model, out, specs, quant, data
        self._rows = _choose(data.rows())
        self._merged = out.subdir("merged")
        self.wanted: Mapping[str, int] = {spec.name: 1 for spec in specs}
        self._shards = ShardWriter(self._merged, specs)

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        self._shards.write(spec.name, rows, block)

    def finish(self, config: JsonObject) -> WrittenWeights:
        """EngineError with the child's reason, and where its log is."""
        self._merged.json("config.json", config)
        for name, path in self._model.files.items():
            self._merged.copy(name, path)
        merged = self._merged.publish(Manifest(target="vllm", name=self._model.name)).path
        versions = self._compress(merged, self._out.path / "quantized")
        quantized = Checkpoint(self._out.path / "quantized")
        _check_names(self._specs, quantized)
        for path in sorted(quantized.path.glob("*.safetensors*")):
            path.chmod((merged / "config.json").stat().st_mode)  # transformers keeps them for their owner
            path.rename(self._out.path / path.name)
        shutil.rmtree(quantized.path)
        shutil.rmtree(merged)
        tokens = sum(len(row) for row in self._rows)
        calibration = {"data": self._data.source, "rows": len(self._rows), "tokens": tokens}
        facts = {"group_size": self._selection.scheme.group, "calibration": calibration, "engine": versions}
        return WrittenWeights(dict(quantized.config["quantization_config"]), facts)

    def close(self) -> None:
        """Release handles, and the merged model with them. Safe twice."""
        self._merged.discard()

    def _compress(self, merged: Path, out: Path) -> dict[str, Any]:
        tokens = self._out.path / "tokens.json"
        tokens.write_text(json.dumps(self._rows), encoding="utf-8")
        config = self._model.config.get("text_config") or self._model.config
        steps = int(config.get("num_hidden_layers") or 0) + 2  # the model loaded, its layers, the head
        log = scratch.log_file(self._quant)
        with (
            self._data.progress.track(f"{self._quant} by llm-compressor", steps) as advance,
            WorkerProcess("llm-compressor", WORKER, {}, log, python=(str(self._python), "-I")) as child,
        ):
            versions = child.call(
                "compress", advance, model=merged, out=out, quant=self._quant, tokens=tokens,
                group=self._selection.scheme.group, ignore=list(self._selection.ignore),
            )  # fmt: skip
        log.unlink()
        tokens.unlink()
        return dict(versions)


class AwqReader(CompressedReader):
    """What AWQ does not move: it scales the inputs of a layer's matrices and takes the scale back before them."""

    def __init__(self, export: Path, manifest: Manifest, model: ExportModel) -> None:
        super().__init__(export, manifest, model)
        self.wanted = {name: rows for name, rows in self.wanted.items() if not DECODER_LAYER.search(name)}


def _select(specs: Sequence[TensorSpec], model: ExportModel, quant: str) -> Selection:
    selection = select(specs, model.config, SCHEMES[CALIBRATED[quant]])
    if selection.stacks:
        raise ExportError(
            f"{next(iter(selection.stacks))}: experts in one tensor, of which no --quant {quant} is tested",
            f"--quant {CALIBRATED[quant]} quantizes them without data",
        )
    return selection


def _choose(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """At most ``ROWS``, spread evenly over the data; none with fewer than two tokens."""
    usable = [list(row) for row in rows if len(row) > 1]
    if not usable:
        raise ExportError("the calibration data has no row of two tokens or more", "name other data with --calibrate")
    count = min(ROWS, len(usable))
    return [usable[number * len(usable) // count] for number in range(count)]


def _check_names(specs: Sequence[TensorSpec], product: Checkpoint) -> None:
    """Every merged tensor is there, plain or quantized, and nothing else; fused experts come back one by one."""
    planned = {spec.name for spec in specs if ".experts." not in spec.name}
    written = {PACKED.sub("weight", spec.name) for spec in product.specs() if ".experts." not in spec.name}
    wrong = sorted(planned ^ written)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise EngineError(
            f"llm-compressor wrote other tensors than planned: {', '.join(wrong[:3])}{more}",
            "--quant w4a16 and nvfp4 quantize without it",
        )
