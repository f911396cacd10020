"""Who lays the file out: we, for the families in our tables; llama.cpp's own converter for all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import lcm
from typing import Any

from converters.gguf import tree
from converters.gguf.architectures import ARCHITECTURES
from converters.gguf.native import Native
from converters.gguf.part import Layout
from converters.gguf.upstream import Upstream
from lora2serve.exporter import Model

SENSES = ("vision_config", "audio_config", "vision_encoder", "vision_tower")


def layouts(model: Model, options: Any) -> list[Layout]:
    """The model's file, and that of its projector if it has one; ExportError for what nobody knows.

    ``options`` is a GgufOptions.
    """
    name = (model.config.get("architectures") or ["none"])[0]
    if name in ARCHITECTURES:
        return [Native(model, options)]
    there = tree.converter()
    if there is None or name not in tree.known(there):
        raise tree.refuse(name, sorted(ARCHITECTURES), there)
    found: list[Layout] = [Upstream(model, options, there)]
    if name in tree.known(there, projector=True) and any(model.config.get(key) for key in SENSES):
        found.append(Upstream(model, options, there, projector=True))
    return found


def together(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Rows that must come at once for every file that wants them: tensor -> rows."""
    found: dict[str, int] = {}
    for wanted in parts:
        found |= {name: lcm(found.get(name, 1), rows) for name, rows in wanted.items()}
    return found
