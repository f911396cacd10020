"""Who lays a GGUF file out: we, for the families in our tables; llama.cpp's own converter for all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import lcm
from pathlib import Path

from converters.gguf.gguf_layout import Backend, LayoutOptions
from converters.gguf.native.architectures import ARCHITECTURES
from converters.gguf.native.native_backend import NativeBackend
from converters.gguf.upstream import llama_cpp_source
from converters.gguf.upstream.upstream_backend import UpstreamBackend
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.merge.layout import HEAD, is_tied

MULTIMODAL_KEYS = ("vision_config", "audio_config", "vision_encoder", "vision_tower")  # of a config


def open_backends(model: ExportModel, options: LayoutOptions) -> list[Backend]:
    """For the model's file, and for that of its projector if it has one; ExportError for what nobody knows."""
    if is_native(model):
        return [NativeBackend(model, options)]
    name, tree = _architecture(model), _converter(model)
    backends: list[Backend] = [UpstreamBackend(model, options, tree)]
    if name in llama_cpp_source.known(tree, projector=True) and any(model.config.get(key) for key in MULTIMODAL_KEYS):
        backends.append(UpstreamBackend(model, options, tree, projector=True))
    return backends


def is_native(model: ExportModel) -> bool:
    """Whether the model is of a family in our tables."""
    return _architecture(model) in ARCHITECTURES


def upstream(model: ExportModel) -> UpstreamBackend:
    """The model's 16-bit file as llama.cpp's converter lays it out."""
    return UpstreamBackend(model, LayoutOptions(), _converter(model))


def _architecture(model: ExportModel) -> str:
    return str((model.config.get("architectures") or ["none"])[0])


def _converter(model: ExportModel) -> Path:
    """llama.cpp's converter; ExportError where there is none, or it does not know the model either."""
    name, tree = _architecture(model), llama_cpp_source.converter()
    if tree is None or name not in llama_cpp_source.known(tree):
        raise llama_cpp_source.refuse(name, sorted(ARCHITECTURES), tree)
    return tree


def refuse_lost(model: ExportModel, opened: Iterable[Backend]) -> None:
    """ExportError for weights that no file has a place for: those of an adapter, a head that is not the embedding."""
    tied = is_tied(model.config)
    heads = {spec.name for spec in model.source.specs() if spec.name.endswith(HEAD)}
    needed = set(model.source.changed()) - heads if tied else {*model.source.changed(), *heads}
    lost = sorted(needed.difference(*(backend.wanted for backend in opened)))
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ExportError(
            f"architecture {_architecture(model)}: GGUF has no place for {shown}, which would be lost",
            "serve it with --target vllm",
        )


def rows_at_once(wanted: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Rows that must come at once for every file that wants them: tensor -> rows."""
    combined: dict[str, int] = {}
    for tensors in wanted:
        combined |= {name: lcm(combined.get(name, 1), rows) for name, rows in tensors.items()}
    return combined
