"""A PEFT adapter directory: its config, and what each of its tensors does to which weight.

Keys are those of PEFT's ``save_pretrained`` (``peft/utils/save_and_load.py``): ``base_model.model.<module>.``
and then ``lora_A.weight``, ``lora_embedding_A``, ``lora_magnitude_vector``, ... Older versions wrote
``modules_to_save.`` into the key and ``.weight`` behind the magnitude.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora2serve.adapters.deltas import AdapterTensor, AddVector, Delta, EmbeddingLora, Lora, Replace, ReplaceRows
from lora2serve.adapters.peft_methods import NATIVE, needs_peft
from lora2serve.adapters.wrappers import NAMES_OF_CONFIG, unwrap_names, unwrap_tensors
from lora2serve.errors import AdapterError, raise_all
from lora2serve.system.small_files import JsonObject, inside, read_json
from lora2serve.weights.checkpoint import SafetensorsFiles, read_header

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# <module>.<kind>, the longest first; what no pattern takes is a tensor trained in full.
_KINDS = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|(?:token_adapter\.)?trainable_tokens_delta)(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_TOKENS = "trainable_tokens_delta"
_WRAPPERS = re.compile(
    r"(\.modules_to_save(\.default)?|(\.token_adapter)?\.base_layer|\.original_module|\.ln_tuning_layers)"
    r"(?=\.(weight|bias)$)"
)


@dataclass(frozen=True)
class Layer:
    """The LoRA tensors of one module: kind (``lora_A``, ``lora_B.bias``, ...) -> part."""

    module: str
    parts: Mapping[str, AdapterTensor]


@dataclass(frozen=True)
class ParameterDelta:
    """One delta and the parameter it belongs to, by the name the trained model had for it."""

    parameter: str  # such as model.layers.0.self_attn.q_proj.weight
    delta: Delta


@dataclass
class Adapter:
    """One adapter, opened: headers and config only."""

    path: Path
    config: dict[str, Any]
    tensors: SafetensorsFiles
    layers: dict[str, Layer] = field(default_factory=dict)
    full: dict[str, AdapterTensor] = field(default_factory=dict)  # parameter -> its trained value

    @property
    def method(self) -> str:
        """``LORA``, ``LOHA``, ...: PEFT's ``peft_type``."""
        return str(self.config.get("peft_type", "LORA")).upper()

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA of any kind."""
        return self.method == "LORA"

    @property
    def base(self) -> str:
        """``base_model_name_or_path``, empty where PEFT was not told."""
        return self.config.get("base_model_name_or_path") or ""

    def rank(self, module: str, default: int = 1) -> int:
        """The rank that PEFT gave this module."""
        return int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", default)))

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, with this module's own rank and alpha."""
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        rank = self.rank(module, rank)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def changes(self) -> list[ParameterDelta]:
        """Every change to a plain weight, trained-in-full tensors first (LoRA then comes on top of them)."""
        changes = [ParameterDelta(name, Replace(part)) for name, part in self.full.items()]
        for layer in self.layers.values():
            changes += self._layer_changes(layer)
        return changes

    def beside(self, wrapped: Container[str]) -> tuple[list[ParameterDelta], list[str]]:
        """What the file holds beside PEFT's ``wrapped`` modules: changes, trained in full or by token; and the keys
        of the tensors that are PEFT's own.
        """
        changes, own = [], []
        for spec in self.tensors.specs():
            name, part = spec.name.removeprefix(PREFIX), AdapterTensor(self.tensors, spec.name, spec.shape)
            plain = _WRAPPERS.sub("", name)
            module, _, leaf = plain.rpartition(".")
            if match := _KINDS.fullmatch(name) if name.endswith(_TOKENS) else None:
                changes += self._layer_changes(Layer(match["module"], {_TOKENS: part}))
            elif leaf in ("weight", "bias") and spec.name != name and (plain != name or not _within(module, wrapped)):
                changes.append(ParameterDelta(plain, Replace(part)))
            else:
                own.append(spec.name)
        return changes, own

    def _layer_changes(self, layer: Layer) -> list[ParameterDelta]:
        parts, module = layer.parts, layer.module
        weight = f"{module}.weight"
        if _TOKENS in parts:
            return [ParameterDelta(weight, ReplaceRows(parts[_TOKENS], self._token_indices(module)))]
        if "lora_embedding_A" in parts:
            a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
            return [
                ParameterDelta(
                    weight, EmbeddingLora(a, b, self.scale(module, a.shape[0]), parts.get("lora_magnitude_vector"))
                )
            ]
        a, b = parts["lora_A"], parts["lora_B"]
        scale = self.scale(module, a.shape[0])
        changes = [ParameterDelta(weight, Lora(a, b, scale, parts.get("lora_magnitude_vector")))]
        if "lora_B.bias" in parts:
            changes.append(ParameterDelta(f"{module}.bias", AddVector(parts["lora_B.bias"], scale)))
        return changes

    def _token_indices(self, module: str) -> tuple[int, ...]:
        indices = self.config.get("trainable_token_indices") or self.config.get("token_indices") or []
        if isinstance(indices, dict):
            indices = next((v for k, v in indices.items() if module == k or module.endswith(f".{k}")), [])
        return tuple(int(index) for index in indices)


def open_adapter(path: Path) -> Adapter:
    """Read config and headers of a PEFT directory; every problem of it at once."""
    config = read_config(path)
    if not (path / WEIGHTS).is_file():
        if (path / PICKLE).is_file():
            raise AdapterError(
                f"{path}: {PICKLE} is a pickle, which can run code", "--allow-pickle converts it without running any"
            )
        raise AdapterError(f"{path}: no {WEIGHTS}", "name the directory that PEFT's save_pretrained wrote")
    tensors = SafetensorsFiles(unwrap_tensors(path, read_header(inside(path, WEIGHTS))))
    adapter = Adapter(path, config, tensors)
    if adapter.method in NATIVE:
        _sort_tensors(adapter)
    return adapter


def read_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT directory."""
    if not path.is_dir():
        raise AdapterError(f"{path}: no such adapter directory", "name a run, a PEFT directory or a Hub id")
    config = read_json(path / CONFIG, f"not a PEFT adapter (no {CONFIG})", AdapterError)
    raise_all([f"{path / CONFIG}: {problem}" for problem in _problems(config)], AdapterError)
    return {**config, **{key: unwrap_names(config[key]) for key in NAMES_OF_CONFIG if key in config}}


def _problems(config: JsonObject) -> Iterator[str]:
    """Every field that no PEFT would have written so."""
    method = config.get("peft_type", "LORA")
    if not isinstance(method, str):
        yield f"peft_type is {method!r}, expected a method's name such as 'LORA'"
    elif method.upper() == "LORA":
        for key in ("r", "lora_alpha"):
            if not _is_positive(config.get(key)):
                yield f"{key} is {config.get(key)!r}, expected a positive number"
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(key) or {}
            if not isinstance(patterns, dict) or not all(
                _is_pattern(k) and _is_positive(v) for k, v in patterns.items()
            ):
                yield f"{key} is {patterns!r}, expected patterns of module names with positive numbers"
    ranges = config.get("layer_replication") or []
    if not isinstance(ranges, list) or not all(_is_range(pair) for pair in ranges):
        yield f"layer_replication is {ranges!r}, expected a list of [start, stop]"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_range(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(end) is int for end in pair):
        return False
    return bool(0 <= pair[0] < pair[1])


def _sort_tensors(adapter: Adapter) -> None:
    """Group the LoRA tensors by module; refuse what is incomplete or unknown, all at once."""
    grouped: dict[str, dict[str, AdapterTensor]] = defaultdict(dict)
    problems = []
    for spec in adapter.tensors.specs():
        part = AdapterTensor(adapter.tensors, spec.name, spec.shape)
        name = spec.name.removeprefix(PREFIX)
        match = _KINDS.fullmatch(name)
        if match:
            kind = match["kind"].removeprefix("token_adapter.") + (".bias" if match["leaf"] == ".bias" else "")
            grouped[match["module"]][kind] = part
        elif not re.search(r"\.(lora_|hada_|lokr_|oft_|ia3_|vera_)", name):
            adapter.full[_WRAPPERS.sub("", name)] = part
        elif not needs_peft(adapter):  # which knows its own kinds
            problems.append(f"{spec.name}: unknown kind of adapter tensor")
    for module, parts in grouped.items():
        problems += _incomplete(module, parts)
        adapter.layers[module] = Layer(module, parts)
    raise_all([f"{adapter.path}: {problem}" for problem in problems], AdapterError)


def _incomplete(module: str, parts: Mapping[str, AdapterTensor]) -> list[str]:
    problems = []
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if (a in parts) != (b in parts):
            problems.append(f"{module}: {a if a in parts else b} without its {b if a in parts else a}")
        elif a in parts and parts[a].shape[0] != parts[b].shape[-1]:
            problems.append(f"{module}: {a} has rank {parts[a].shape[0]}, {b} has {parts[b].shape[-1]}")
    if not problems and not {"lora_A", "lora_embedding_A", _TOKENS} & parts.keys():
        problems.append(f"{module}: {', '.join(parts)} without lora_A and lora_B")
    return problems


def _within(name: str, modules: Container[str]) -> bool:
    """Whether ``name`` or any module around it is among ``modules``."""
    while name:
        if name in modules:
            return True
        name = name.rpartition(".")[0]
    return False


def _by_pattern(patterns: JsonObject | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name (``peft.utils.get_pattern_key``)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
