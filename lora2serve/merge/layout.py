"""Which tensors the merged model has, and from which stored one each starts: replicated layers, untied heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora2serve.adapters.adapter import Adapter, ParameterDelta
from lora2serve.adapters.deltas import ReplaceRows
from lora2serve.adapters.peft_layers import PeftLayers
from lora2serve.adapters.peft_methods import needs_peft, refuse_unmergeable
from lora2serve.errors import MergeError
from lora2serve.weights.tensors import TensorSpec

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Slot:
    """One tensor of the merged model before its deltas."""

    spec: TensorSpec
    stored: str


def lay_out(
    specs: Sequence[TensorSpec], adapters: Sequence[Adapter], config: dict[str, Any]
) -> tuple[list[Slot], list[list[ParameterDelta]]]:
    """The slots, and for each adapter its changes in the order of folding; ``config`` is brought up to date."""
    slots = _replicate(specs, adapters, config)
    return _untie(slots, adapters, config)


def _replicate(specs: Sequence[TensorSpec], adapters: Sequence[Adapter], config: dict[str, Any]) -> list[Slot]:
    """PEFT's ``layer_replication``: a list of [start, stop) of old layers, laid one after another."""
    ranges = [a.config["layer_replication"] for a in adapters if a.config.get("layer_replication")]
    if not ranges:
        return [Slot(spec, spec.name) for spec in specs]
    if len(adapters) > 1:
        raise MergeError("layer_replication together with another adapter: each would mean other layers")
    order = [layer for start, stop in ranges[0] for layer in range(start, stop)]
    by_layer: dict[int, list[TensorSpec]] = defaultdict(list)
    rest = []
    for spec in specs:
        number = spec.name.partition(".layers.")[2].split(".", 1)[0]
        if number.isdigit():
            by_layer[int(number)].append(spec)
        else:
            rest.append(Slot(spec, spec.name))
    missing = sorted(set(order) - by_layer.keys())
    if missing:
        raise MergeError(
            f"layer_replication names layer {missing[0]}, the base has {len(by_layer)}", "name its base with --base"
        )
    config["num_hidden_layers"] = len(order)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][old] for old in order]
    laid = [
        Slot(replace(spec, name=spec.name.replace(f".layers.{old}.", f".layers.{new}.", 1)), spec.name)
        for new, old in enumerate(order)
        for spec in by_layer[old]
    ]
    return [*laid, *rest]


def _untie(
    slots: list[Slot], adapters: Sequence[Adapter], config: dict[str, Any]
) -> tuple[list[Slot], list[list[ParameterDelta]]]:
    """Keep embedding and head tied where training changed both alike, else give the head a tensor of its own.

    PEFT trains one of two tied modules without touching the other, unless ``ensure_weight_tying``; trained
    tokens follow the tie. What counts is the model as it was trained.
    """
    changes = [_changes(adapter, config) for adapter in adapters]
    embedding = next((slot for slot in slots if slot.spec.name.endswith(EMBEDDINGS)), None)
    head = next((slot for slot in slots if slot.spec.name.endswith(HEAD)), None)
    if embedding is None or (head is not None and not _says_tied(config)):
        return slots, changes
    touched = [change for part in changes for change in part if change.parameter.endswith((*EMBEDDINGS, HEAD))]
    together = [_trained_together(adapter, part) for adapter, part in zip(adapters, changes, strict=True)]
    if touched and not all(together):
        config["tie_word_embeddings"] = False
        if head is None:
            head = Slot(replace(embedding.spec, name=HEAD), embedding.stored)
            slots = [*slots, head]
    pairs = zip(together, changes, strict=True)
    return slots, [_mirror(part, embedding, head) if follows else part for follows, part in pairs]


def _changes(adapter: Adapter, config: Mapping[str, Any]) -> list[ParameterDelta]:
    refuse_unmergeable(adapter)
    return PeftLayers(adapter, config).changes() if needs_peft(adapter) else adapter.changes()


def _mirror(changes: list[ParameterDelta], embedding: Slot, head: Slot | None) -> list[ParameterDelta]:
    """Changes of a tied pair, once for each tensor of the pair that the merged model has."""
    pair = [c for c in changes if c.parameter.endswith((*EMBEDDINGS, HEAD))]
    rest = [c for c in changes if c not in pair]
    first = [c for c in pair if c.parameter.endswith(EMBEDDINGS)] or pair
    targets = [embedding.spec.name, *([head.spec.name] if head else [])]
    return rest + [ParameterDelta(name, change.delta) for name in targets for change in first]


def _trained_together(adapter: Adapter, changes: list[ParameterDelta]) -> bool:
    pair = [c for c in changes if c.parameter.endswith((*EMBEDDINGS, HEAD))]
    return bool(adapter.config.get("ensure_weight_tying")) or all(isinstance(c.delta, ReplaceRows) for c in pair)


def _says_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", False))
