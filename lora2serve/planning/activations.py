"""What one micro-batch holds beside the weights at its fullest moment: the closed form.

Of decoder layers as transformers computes them, with SDPA: what autograd keeps of each operation, and what is alive
while its gradient is taken. ``--exact`` runs the real code instead; tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora2serve.planning.model_shape import LinearShape, ModelShape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import sharded_bytes, target_layers, trainable

FLOAT = 4  # bytes
TILE_TOKENS, TILE_LOGITS = 4096, 32768  # of TRL's head: tiles of logits of that size, in a buffer of its own
PLAIN_TILE = 29  # bytes a logit while such a tile is turned into its gradient without Triton, on a CPU


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes."""

    stored: int  # between forward and backward, of all layers
    layer: int  # of the layer in hand, beside
    head: int  # of the loss, beside: before a layer is in hand


def activation_memory(shape: ModelShape, settings: PlanSettings) -> ActivationMemory:
    """What a forward and backward of ``settings`` keep at most."""
    inputs = _lora_inputs(shape, settings)
    saved = _saved(shape, settings, inputs)
    working = _working(shape, settings, inputs)
    states = settings.tokens * settings.kept_bytes * shape.hidden  # what goes from layer to layer
    head = _head(shape, settings)
    if settings.shards > 1:  # put together: this layer and the next one, and the head while it is used
        of_head = shape.head * settings.kept_bytes
        of_ends = (shape.embedding + shape.head) * settings.kept_bytes if shape.head else 0
        working += 2 * (sharded_bytes(shape, settings) - of_ends) // shape.layers
        head += of_head
    copies = settings.copied_bytes * trainable(shape, settings)
    if settings.checkpointing:
        return ActivationMemory(states * shape.layers + copies, saved + working, head)
    if settings.casts and not copies:
        copies = settings.itemsize * trainable(shape, settings)  # by autocast
    return ActivationMemory(saved * shape.layers + copies, working, head)


@dataclass(frozen=True)
class _LoraInputs:
    """What the adapters of one layer keep for their own gradients: bytes a token."""

    wide: int  # inputs that nothing else keeps, but those from the width of the MLP
    down: int  # the same of the latter
    transient: int  # beside it, while the latter is made
    own: bool  # whether each adapter keeps a copy of its own: cast, or with dropout
    ranks: int  # what lies between A and B


def _lora_inputs(shape: ModelShape, settings: PlanSettings) -> _LoraInputs:
    size = settings.itemsize
    if settings.method == "full":  # each linear layer keeps its input, and each norm what it has normalized
        return _LoraInputs(size * 2 * shape.hidden + size * shape.norm_width, size * shape.mlp, 0, False, 0)
    layers = max(1, shape.layers)
    chosen = target_layers(shape, settings.targets)
    ranks = size * settings.rank * len(chosen) // layers
    down = [item for item in chosen if _is_down(item, shape)]
    others = [item for item in chosen if not _is_down(item, shape)]
    mask = settings.mask_bytes if settings.dropout else 0
    if settings.casts or settings.dropout:
        each = size + mask
        cast = FLOAT * shape.mlp * (2 if settings.dropout else 1) if settings.casts and settings.method == "lora" else 0
        wide = sum(each * item.inputs for item in others) // layers
        return _LoraInputs(wide, each * shape.mlp if down else 0, cast if down else 0, True, ranks)
    groups = {item.in_attention for item in others if item.inputs == shape.hidden and not item.path.endswith("o_proj")}
    return _LoraInputs(
        settings.kept_bytes * shape.hidden * len(groups), size * shape.mlp if down else 0, 0, False, ranks
    )


def _is_down(linear: LinearShape, shape: ModelShape) -> bool:
    """Whether it leads from the width of the MLP back to the model's."""
    return linear.inputs == shape.mlp and not linear.in_attention


def _saved(shape: ModelShape, settings: PlanSettings, inputs: _LoraInputs) -> int:
    """Of one layer, until its backward."""
    size, wide = settings.itemsize, settings.kept_bytes
    # norms compute in float32: what is 16 bits wide is cast, and what is 32 bits wide is the checkpoint itself
    first = shape.hidden if wide == FLOAT and settings.checkpointing else 0
    norms = FLOAT * (shape.norm_width - first)
    keys = shape.query if settings.padded else shape.key  # to a kernel with a mask, keys and values go once a query
    attention = size * 2 * (shape.query + keys) + FLOAT * shape.heads
    gated = 3 if shape.gated else 2
    token = norms + attention + gated * wide * shape.mlp + inputs.wide + inputs.down + inputs.ranks
    return settings.tokens * token + (settings.tokens * settings.length * size if settings.padded else 0)


def _working(shape: ModelShape, settings: PlanSettings, inputs: _LoraInputs) -> int:
    """Of the last layer beside what it saves: in the recomputed forward, or in the backward of its MLP."""
    size, wide, tokens = settings.itemsize, settings.kept_bytes, settings.tokens
    mask = tokens * settings.length if settings.padded else 0
    mlp = tokens * wide * shape.mlp
    matrix = size * max(item.numel for item in shape.matrices) if settings.method == "qlora" else 0
    backward = wide * shape.hidden * tokens + max(3 * mlp, (2 if inputs.down else 1) * mlp + matrix)
    backward -= tokens * inputs.down  # given back by then
    if not (inputs.own and settings.checkpointing):
        return mask + backward
    forward = tokens * (5 * wide * shape.hidden + inputs.transient) + mlp
    return mask + max(forward, backward)


def _head(shape: ModelShape, settings: PlanSettings) -> int:
    """Of the loss: the buffer of logits, the last states three times over, and what makes the gradient of a tile."""
    size, tokens = settings.itemsize, settings.tokens
    rows = min(tokens, TILE_TOKENS)
    head = rows * TILE_LOGITS * size + tokens * shape.hidden * (2 * FLOAT + 2 * size)
    if settings.on_cpu:
        head += rows * min(shape.vocabulary, TILE_LOGITS) * PLAIN_TILE - tokens * shape.hidden * FLOAT
    in_full = settings.method == "full" or any(
        name.endswith(("lm_head", "embed_out")) for name in settings.modules_to_save
    )
    if settings.new_tokens:  # the head with its new rows in place, beside the one without
        head += shape.vocabulary * shape.hidden * settings.kept_bytes
    if in_full or settings.new_tokens:
        head += shape.vocabulary * shape.hidden * (FLOAT + (size if size < FLOAT else 0))
    return head
