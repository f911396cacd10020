"""Run the true pipeline in a test: checkpoint + adapters -> merged directory, and compare with an oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora2serve.adapters.adapter import open_adapter
from lora2serve.exporting.sinks import ExportModel, find
from lora2serve.exporting.stream import Plan, export
from lora2serve.merge.merged import Merged
from lora2serve.progress import Progress, Silent
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized
from lora2serve.weights.tensors import DType


def fold(base: Path, adapters: Sequence[Path], dtype: DType | None = None) -> Merged:
    """The merged model, not yet written."""
    checkpoint = Checkpoint(base)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Merged(Dequantized(checkpoint), [open_adapter(path) for path in adapters], config, dtype)


def export_merged(
    base: Path,
    adapters: Sequence[Path],
    out: Path,
    dtype: DType | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Merge into a vLLM directory by the real sink and stream."""
    merged = fold(base, adapters, dtype)
    exporter = find("vllm")
    model = ExportModel(merged, {}, "tiny", str(base))
    return export(model, [Plan("vllm", exporter, exporter.Options(**options), out)], progress or Silent())[0].path


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory, as stored, by safetensors' own reader."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def worst_ulp(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, int]:
    """Per tensor, the largest distance in units in the last place of ``got``'s type (bits as sortable integers).

    With ``base``, the sum in float32 may itself be NOISE of the larger of base and result off: where a delta cancels
    the weight, that is many units of the small result.
    """
    if base is not None:
        expected = {name: _within_noise(tensor, expected[name], base[name]) for name, tensor in got.items()}
    return {name: _ulp(tensor, expected[name].to(tensor.dtype)) for name, tensor in got.items()}


NOISE = 2.0**-21  # four units in the last place of float32


def _within_noise(got: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Of all sums in float32 as good as ``expected``, rounded, the one nearest to ``got``."""
    expected = expected.float()
    noise = NOISE * torch.maximum(expected.abs(), base.float().abs())
    return got.clamp((expected - noise).to(got.dtype), (expected + noise).to(got.dtype))


def _ulp(a: torch.Tensor, b: torch.Tensor) -> int:
    assert a.shape == b.shape, (a.shape, b.shape)
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    bits = [t.contiguous().view(kind).long() for t in (a, b)]
    top = 1 << (8 * a.element_size() - 1)
    ordered = [torch.where(x < 0, -(x & (top - 1)), x) for x in bits]
    return int((ordered[0] - ordered[1]).abs().max()) if a.numel() else 0
