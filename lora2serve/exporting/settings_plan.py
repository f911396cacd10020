"""An export's settings, planned once more from base, adapter and target: all that lies beside the values of weights.

Each target says them by the functions that its sink writes them with, as a value; parity compares them with what lies
in the export's directory. No weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeAlias

from lora2serve.artifacts.manifest import Manifest
from lora2serve.exporting import sinks
from lora2serve.exporting.sinks import ExportFacts, ExportModel

Values: TypeAlias = Mapping[str, object]  # key -> value

# Target -> what plans its settings: a function (model, options) -> PlannedSettings.
PLANNERS = {
    "vllm": "converters.vllm.vllm_sink:plan_settings",
    "gguf": "converters.gguf.gguf_settings:plan_settings",
    "ollama": "converters.ollama.ollama_sink:plan_settings",
    "ollama-adapter": "converters.ollama.ollama_adapter:plan_settings",
    "lmstudio": "converters.lmstudio:plan_settings",
    "adapter": "converters.adapter.adapter_sink:plan_settings",
    "gguf-adapter": "converters.gguf.gguf_adapter:plan_settings",
}
GGUF_READER = "converters.gguf.gguf_settings:read"  # a file's keys, and the types and shapes of its tensors
MODELFILE_READER = "converters.ollama.modelfile_parser:settings"  # a Modelfile's commands
IN_MANIFEST = ("quant", "match_reference", "from_model")  # options that are a field of the manifest


@dataclass(frozen=True)
class HeaderValue:
    """A value in a file's header, and its type there."""

    kind: str
    value: object


Header: TypeAlias = Mapping[str, HeaderValue]


@dataclass(frozen=True)
class PlannedSettings:
    """What must lie beside the weights, and in their headers.

    ``unplanned``: pattern of ``FILE:KEY`` -> why nothing was planned there.
    """

    files: Mapping[str, bytes]
    headers: Mapping[str, Header] = field(default_factory=dict)  # of GGUF files, by name
    weights: tuple[str, ...] = ()  # names of files that hold weights
    facts: ExportFacts = field(default_factory=ExportFacts)
    unplanned: Mapping[str, str] = field(default_factory=dict)

    def inside(self, folder: str) -> PlannedSettings:
        """The same, of files that lie in a folder."""
        return replace(
            self,
            headers={f"{folder}/{name}": header for name, header in self.headers.items()},
            weights=tuple(f"{folder}/{name}" for name in self.weights),
            facts=replace(self.facts, file=f"{folder}/{self.facts.file}"),
            unplanned={f"*{pattern}": why for pattern, why in self.unplanned.items()},
        )


def plan_again(model: ExportModel, manifest: Manifest) -> PlannedSettings | None:
    """The settings of an export with that manifest; None for a target that cannot say them.

    Raises what the export itself would be refused with.
    """
    if manifest.target not in PLANNERS:
        return None
    planner: Callable[[ExportModel, Any], PlannedSettings] = resolve_name(PLANNERS[manifest.target])
    return planner(model, options_again(manifest))


def read_gguf(path: Path) -> Header:
    """The settings in a GGUF file; CheckpointError where it is damaged."""
    header: Header = resolve_name(GGUF_READER)(path)
    return header


def read_modelfile(text: str) -> Values:
    """The settings in a Modelfile; ValueError where Ollama would not read it."""
    values: Values = resolve_name(MODELFILE_READER)(text)
    return values


def recorded_options(options: object) -> dict[str, object]:
    """What was chosen of a target's options, for the manifest: plain values that are not the default."""
    chosen = {}
    for option in fields(options):  # type: ignore[arg-type]  # every target's options are a dataclass
        value = getattr(options, option.name)
        plain = isinstance(value, bool | int | float | str | tuple)
        if plain and value != option.default and option.name not in IN_MANIFEST and option.metadata.get("record", True):
            chosen[option.name] = list(value) if isinstance(value, tuple) else value
    return chosen


def options_again(manifest: Manifest) -> Any:
    """The target's options, as the manifest has them on record; of what is no choice of the user's, none."""
    kind = sinks.find(manifest.target).Options
    known = {option.name for option in fields(kind) if option.metadata.get("record", True)}
    recorded = manifest.options if manifest.options is not None else _of_earlier(manifest)
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    chosen |= {name: getattr(manifest, name) for name in IN_MANIFEST}
    return kind(**{name: value for name, value in chosen.items() if name in known})


def _of_earlier(manifest: Manifest) -> Mapping[str, object]:
    """What a manifest without a record of the options tells of them."""
    told = {"served_base": manifest.served_base}
    if manifest.target == "lmstudio" and manifest.file:
        told["publisher"] = manifest.file.split("/")[0]
    return {name: value for name, value in told.items() if value is not None}
