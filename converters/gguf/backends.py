"""Who lays the file out: we, for the families in our tables; llama.cpp's own converter for all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import lcm
from pathlib import Path
from typing import Any

from converters.gguf.gguf_writer import Layout
from converters.gguf.native.architectures import ARCHITECTURES
from converters.gguf.native.native_backend import Native
from converters.gguf.upstream import llama_cpp_source
from converters.gguf.upstream.upstream_backend import Upstream
from lora2serve.exporting.sinks import ExportModel

SENSES = ("vision_config", "audio_config", "vision_encoder", "vision_tower")


def layouts(model: ExportModel, options: Any) -> list[Layout]:
    """The model's file, and that of its projector if it has one; ExportError for what nobody knows.

    ``options`` is a GgufOptions.
    """
    if is_native(model):
        return [Native(model, options)]
    name, there = _architecture(model), _converter(model)
    found: list[Layout] = [Upstream(model, options, there)]
    if name in llama_cpp_source.known(there, projector=True) and any(model.config.get(key) for key in SENSES):
        found.append(Upstream(model, options, there, projector=True))
    return found


def is_native(model: ExportModel) -> bool:
    """Whether the model is of a family in our tables."""
    return _architecture(model) in ARCHITECTURES


def upstream(model: ExportModel) -> Upstream:
    """The model's 16-bit file as llama.cpp's converter lays it out."""
    from converters.gguf.gguf_sink import GgufOptions

    return Upstream(model, GgufOptions(quant="F16"), _converter(model))


def _architecture(model: ExportModel) -> str:
    return str((model.config.get("architectures") or ["none"])[0])


def _converter(model: ExportModel) -> Path:
    """llama.cpp's converter; ExportError where there is none, or it does not know the model either."""
    name, there = _architecture(model), llama_cpp_source.converter()
    if there is None or name not in llama_cpp_source.known(there):
        raise llama_cpp_source.refuse(name, sorted(ARCHITECTURES), there)
    return there


def together(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Rows that must come at once for every file that wants them: tensor -> rows."""
    found: dict[str, int] = {}
    for wanted in parts:
        found |= {name: lcm(found.get(name, 1), rows) for name, rows in wanted.items()}
    return found
