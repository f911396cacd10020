"""What lies in memory all the time: weights, their 4-bit state, the adapter, its gradients and the optimizer's state.

The sizes of a 4-bit weight are those of bitsandbytes 0.50 (``Params4bit`` and ``QuantState``): codes of 4 bits, one
scale per 64 values, and with double quantization scales of 8 bits with one float32 scale per 256 of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora2serve.adapters.target_presets import named, preset_modules
from lora2serve.config.recipe import EXPERTS, PRESETS
from lora2serve.errors import UsageError, did_you_mean
from lora2serve.planning.model_shape import ExpertShape, LinearShape, ModelShape
from lora2serve.planning.plan_settings import PlanSettings

BLOCK, STATE_BLOCK = 64, 256
CODES, STATE_CODES = 4 * 16, 4 * 256  # bytes of the tables of values, which each weight has for itself
STATES = 2  # of AdamW: both moments


@dataclass(frozen=True)
class StaticMemory:
    """Bytes."""

    weights: int
    quantization_state: int
    adapter: int
    gradients: int
    optimizer: int
    trainable: int  # values, not bytes


def static_memory(shape: ModelShape, settings: PlanSettings) -> StaticMemory:
    """What ``settings`` keep of a model of that shape. UsageError for targets that it does not have."""
    weights, state = _weights(shape, settings)
    if settings.shards > 1:
        whole = weights - sharded_bytes(shape, settings)
        weights = whole + -(-sharded_bytes(shape, settings) // settings.shards)
    if settings.method == "full":
        count = shape.parameters
        return StaticMemory(weights, 0, 0, count * settings.itemsize, optimizer_bytes(count, settings), count)
    count = trainable(shape, settings)
    size = settings.trained_bytes
    return StaticMemory(weights, state, count * size, count * size, optimizer_bytes(count, settings), count)


def _weights(shape: ModelShape, settings: PlanSettings) -> tuple[int, int]:
    """Of the base, and of what is beside 4-bit codes."""
    if shape.stored_bytes is not None and settings.method != "full":
        return shape.stored_bytes, 0
    experts = [each for each in shape.experts if each.quantizable]
    packed = sum((each.numel + 1) // 2 for each in shape.linears) + sum(each.numel // 2 for each in experts)
    others = shape.others * settings.kept_bytes
    if settings.method != "qlora":
        return others + sum(each.numel for each in shape.matrices) * settings.itemsize, 0
    states = [_state_bytes(linear.numel, settings.double_quant) for linear in shape.linears]
    states += [_state_bytes(each.outputs * each.inputs, settings.double_quant, each.count) for each in experts]
    others += sum(each.numel for each in shape.experts if not each.quantizable) * settings.kept_bytes
    return others + packed, sum(states)


def sharded_bytes(shape: ModelShape, settings: PlanSettings) -> int:
    """Of the base, those of layers, embeddings and head, which are cut into parts; the last two unless they are one."""
    layers = sum(each.numel for each in shape.matrices) * settings.itemsize
    if settings.method == "qlora":
        layers = sum((each.numel + 1) // 2 for each in shape.matrices)
    return layers + ((shape.embedding + shape.head) * settings.kept_bytes if shape.head else 0)


def _state_bytes(numel: int, double_quant: bool, experts: int = 1) -> int:
    """Beside the codes of one weight: its scales, the table of its codes, and with double quantization an offset.

    Of several experts, each of ``numel`` values, the tables are there once.
    """
    blocks = -(-numel // BLOCK)
    if not double_quant:
        return CODES + experts * 4 * blocks
    return CODES + STATE_CODES + experts * (blocks + 4 * -(-blocks // STATE_BLOCK) + 4)


def optimizer_bytes(count: int, settings: PlanSettings) -> int:
    """AdamW's two moments of ``count`` values; with 8 bits one byte each, and a float32 scale per 256."""
    size = settings.itemsize if settings.method == "full" else 4
    return STATES * (count * size if settings.optimizer_bits == 32 else count + 4 * -(-count // STATE_BLOCK))


def trainable(shape: ModelShape, settings: PlanSettings) -> int:
    """Values that the adapter learns."""
    if settings.learned is not None:
        return settings.learned
    chosen = target_layers(shape, settings.targets)
    count = sum(settings.rank * (linear.inputs + linear.outputs) for linear in chosen)
    count += sum(linear.outputs for linear in chosen) if settings.dora else 0
    count += settings.rank * sum(each.count * (each.inputs + each.outputs) for each in target_experts(shape, settings))
    count += settings.new_tokens * shape.hidden * (2 if shape.head else 1)
    return count + sum(_in_full(shape, settings.modules_to_save))


def target_layers(shape: ModelShape, targets: str | Sequence[str]) -> list[LinearShape]:
    """The linear layers that get a LoRA; UsageError for a preset or a name that finds none."""
    paths = [linear.path for linear in shape.linears]
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen: set[str] = set()
    for name in names:
        matches = preset_modules(name, paths) if name in PRESETS else named(paths, [name])
        if not matches:
            leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
            near = did_you_mean(name, [*PRESETS, *leaves])
            hint = f"presets: {', '.join(PRESETS)}; linear layers: {', '.join(leaves)}"
            raise UsageError(f"targets {name!r}: no linear layer of this model{near}", hint)
        chosen |= set(matches)
    return [linear for linear in shape.linears if linear.path in chosen]


def target_experts(shape: ModelShape, settings: PlanSettings) -> list[ExpertShape]:
    """The experts that get a LoRA; UsageError for names that find none."""
    wanted, paths = settings.target_parameters, [each.path for each in shape.experts]
    if not wanted:
        return []
    if not paths:
        raise UsageError(
            "train.lora.target_parameters: this model has no experts in one tensor a layer", "leave it out"
        )
    names = paths if wanted == EXPERTS else list(wanted)
    missing = [name for name in names if not named(paths, [name])]
    if missing:
        raise UsageError(
            f"train.lora.target_parameters: no weight {', '.join(map(repr, missing))} of experts in this model",
            f"experts, or a list of {', '.join(sorted({'.'.join(path.split('.')[-2:]) for path in paths}))}",
        )
    chosen = named(paths, names)
    return [each for each in shape.experts if each.path in chosen]


def _in_full(shape: ModelShape, names: Sequence[str]) -> Iterator[int]:
    """Values of the modules that are trained in full, beside the frozen ones."""
    for name in names:
        if name.rsplit(".", 1)[-1] in ("lm_head", "embed_out"):
            yield shape.head or shape.embedding
        elif name.rsplit(".", 1)[-1] in ("embed_tokens", "wte", "embed_in"):
            yield shape.embedding
        else:
            yield sum(linear.numel for linear in shape.linears if named([linear.path], [name]))
