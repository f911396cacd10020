"""Which tensors the merged model has, and from which stored one each starts: replicated layers, untied heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lora2serve.adapters.adapter import Adapter, ParameterDelta
from lora2serve.adapters.deltas import Delta, Replace, ReplaceRows
from lora2serve.adapters.meta_model import ties_by_default
from lora2serve.adapters.peft_layers import PeftLayers
from lora2serve.adapters.peft_methods import needs_peft, refuse_unmergeable
from lora2serve.errors import MergeError
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import Source, TensorSpec, row_blocks

EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tokens_embed.weight",
    "tok_embeddings.weight", "backbone.embeddings.weight", "model.embeddings.weight",
)  # fmt: skip
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model: which stored tensor it starts from, and what happens to it."""

    spec: TensorSpec
    stored: str
    deltas: tuple[Delta, ...] = ()


@dataclass(frozen=True)
class ModelLayout:
    """The merged model before anything is bound: its tensors, its config, and what each adapter changes, in order."""

    tensors: Sequence[MergedTensor]
    config: JsonObject
    changes: Sequence[Sequence[ParameterDelta]] = ()


def lay_out(
    specs: Sequence[TensorSpec], adapters: Sequence[Adapter], config: JsonObject, find: Callable[[str], str | None]
) -> ModelLayout:
    """The merged model's layout; ``config`` is the base's, and stays as it is.

    ``find`` gives the stored name of a parameter, where the two differ (GPT-NeoX stores its head as ``embed_out``).
    """
    return _untie(_replicate(specs, adapters, config), adapters, find)


def settle_tie(base: Source, config: JsonObject) -> JsonObject:
    """The config with what is true of embedding and head: two that are stored and differ are not tied.

    transformers loads them so, whatever the config says; engines believe the config, and drop the head.
    """
    names = [spec.name for spec in base.specs()]
    embedding = next((name for name in names if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in names if name.endswith(HEAD)), None)
    if embedding is None or head is None or not is_tied(config):
        return config
    if _are_equal(base, embedding, head):
        return config
    return untied(config)


def is_tied(config: JsonObject) -> bool:
    """Whether the config, or its text part, or else the class, ties the head to the embedding."""
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, Mapping) else [])]
    said = [part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None]
    return any(said) if said else ties_by_default(config)


def untied(config: JsonObject) -> JsonObject:
    """The config with a head of its own, wherever it speaks of that."""
    text, config = config.get("text_config"), {**config, "tie_word_embeddings": False}
    return {**config, "text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else config


def resize_vocabulary(
    config: JsonObject, tensors: Sequence[MergedTensor], before: Mapping[str, TensorSpec]
) -> JsonObject:
    """The config with the vocabulary as training left it; embedding and head must agree as they did ``before``.

    Llama 3.2 Vision's never had the same rows: its embedding knows the image's tokens, too.
    """
    tables = {tensor.spec.name: tensor for tensor in tensors if tensor.spec.name.endswith((*EMBEDDINGS, HEAD))}
    rows = {name: tensor.spec.rows for name, tensor in tables.items()}
    grown = {rows[name] - before[tensor.stored].rows for name, tensor in tables.items()}
    if grown == {0} and len(set(rows.values())) > 1:
        return config
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
        raise MergeError(f"embedding and head differ: {counts}", "save the adapter with save_embedding_layers=True")
    deltas = chain.from_iterable(tensor.deltas for tensor in tables.values())
    if grown <= {0} and not any(isinstance(delta, Replace) for delta in deltas):
        return config
    (size,) = set(rows.values())
    text = config.get("text_config")
    if "vocab_size" in config:
        return {**config, "vocab_size": size}
    return {**config, "text_config": {**text, "vocab_size": size}} if text else config


def _replicate(specs: Sequence[TensorSpec], adapters: Sequence[Adapter], config: JsonObject) -> ModelLayout:
    """PEFT's ``layer_replication``: a list of [start, stop) of old layers, laid one after another."""
    ranges = [a.config["layer_replication"] for a in adapters if a.config.get("layer_replication")]
    if not ranges:
        return ModelLayout([MergedTensor(spec, spec.name) for spec in specs], config)
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
            rest.append(MergedTensor(spec, spec.name))
    missing = sorted(set(order) - by_layer.keys())
    if missing:
        raise MergeError(
            f"layer_replication names layer {missing[0]}, the base has {len(by_layer)}", "name its base with --base"
        )
    config = {**config, "num_hidden_layers": len(order)}
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][old] for old in order]
    replicated = [
        MergedTensor(replace(spec, name=spec.name.replace(f".layers.{old}.", f".layers.{new}.", 1)), spec.name)
        for new, old in enumerate(order)
        for spec in by_layer[old]
    ]
    return ModelLayout([*replicated, *rest], config)


def _are_equal(base: Source, embedding: str, head: str) -> bool:
    import torch

    first, second = (next(spec for spec in base.specs() if spec.name == name) for name in (embedding, head))
    if first.shape != second.shape:
        return False
    return all(
        torch.equal(base.read(embedding, rows).values, base.read(head, rows).values) for rows in row_blocks(first)
    )


def _untie(layout: ModelLayout, adapters: Sequence[Adapter], find: Callable[[str], str | None]) -> ModelLayout:
    """Keep embedding and head tied where training changed both alike, else give the head a tensor of its own.

    PEFT trains one of two tied modules without touching the other, unless ``ensure_weight_tying``; trained
    tokens follow the tie. What counts is the model as it was trained.
    """
    tensors, config = list(layout.tensors), layout.config
    changes = [_changes(adapter, config) for adapter in adapters]
    embedding = next((tensor for tensor in tensors if tensor.spec.name.endswith(EMBEDDINGS)), None)
    head = _head(tensors, chain.from_iterable(changes), find)
    if embedding is None or (head is not None and not is_tied(config)):
        return replace(layout, changes=changes)
    touched = [change for own in changes for change in own if change.parameter.endswith((*EMBEDDINGS, HEAD))]
    together = [_trained_together(adapter, own) for adapter, own in zip(adapters, changes, strict=True)]
    if touched and not all(together):
        config = untied(config)
        if head is None:
            head = MergedTensor(replace(embedding.spec, name=HEAD), embedding.stored)
            tensors.append(head)
    pairs = zip(together, changes, strict=True)
    mirrored = [_mirror(own, embedding, head) if follows else own for follows, own in pairs]
    return ModelLayout(tensors, config, mirrored)


def _head(
    tensors: Sequence[MergedTensor], changes: Iterable[ParameterDelta], find: Callable[[str], str | None]
) -> MergedTensor | None:
    """The stored head; it may have another name, which matters where an adapter changes it."""
    head = next((tensor for tensor in tensors if tensor.spec.name.endswith(HEAD)), None)
    changed = next((change.parameter for change in changes if change.parameter.endswith(HEAD)), None)
    tables = [tensor for tensor in tensors if len(tensor.spec.shape) == 2 and ".layers." not in tensor.spec.name]
    if head is not None or changed is None or all(tensor.spec.name.endswith(EMBEDDINGS) for tensor in tables):
        return head
    stored = find(changed)
    return next((tensor for tensor in tensors if tensor.stored == stored), None)


def _changes(adapter: Adapter, config: JsonObject) -> list[ParameterDelta]:
    refuse_unmergeable(adapter)
    return PeftLayers(adapter, config).changes() if needs_peft(adapter) else adapter.changes()


def _mirror(changes: list[ParameterDelta], embedding: MergedTensor, head: MergedTensor | None) -> list[ParameterDelta]:
    """Changes of a tied pair, once for each tensor of the pair that the merged model has."""
    pair = [c for c in changes if c.parameter.endswith((*EMBEDDINGS, HEAD))]
    rest = [c for c in changes if c not in pair]
    first = [c for c in pair if c.parameter.endswith(EMBEDDINGS)] or pair
    targets = [embedding.spec.name, *([head.spec.name] if head else [])]
    return rest + [ParameterDelta(name, change.delta) for name in targets for change in first]


def _trained_together(adapter: Adapter, changes: list[ParameterDelta]) -> bool:
    pair = [c for c in changes if c.parameter.endswith((*EMBEDDINGS, HEAD))]
    return bool(adapter.config.get("ensure_weight_tying")) or all(isinstance(c.delta, ReplaceRows) for c in pair)
