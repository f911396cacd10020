"""The memory of one training by part, which GPUs hold it, and what would make it smaller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora2serve.config.train_methods import LORA, ON_FOUR_BITS, STATES
from lora2serve.planning.activations import ActivationMemory, activation_memory
from lora2serve.planning.gpus import GPUS, GpuModel
from lora2serve.planning.model_shape import ModelShape
from lora2serve.planning.plan_settings import Method, PlanSettings
from lora2serve.planning.static_memory import StaticMemory, static_memory

WORKSPACE = 32 << 20  # bytes of cuBLAS on a recent GPU, which torch's allocator counts, too
CONTEXT = 470_000_000 + WORKSPACE  # of CUDA on a recent GPU, not of torch's allocator: about, and not measured here
WORTHWHILE = 0.995  # of what it was before: less than that is no help
USABLE = 0.97  # of a GPU's memory: the allocator rounds up, and does not find room in every gap


@dataclass(frozen=True)
class PlannedBytes:
    """Bytes on the device at the fullest moment of a step, by part."""

    weights: int
    quantization_state: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int  # what the loss takes beyond the layer in hand: both are never held at once
    context: int  # what is no tensor: CUDA's context; and what earlier runs on this machine took beyond their plan

    @property
    def total(self) -> int:
        """The sum."""
        return self.tensors + self.context

    @property
    def tensors(self) -> int:
        """The sum of what torch allocates, as ``torch.cuda.max_memory_allocated`` counts."""
        return (
            self.weights + self.quantization_state + self.adapter + self.gradients + self.optimizer + self.activations
            + self.logits
        )  # fmt: skip


@dataclass(frozen=True)
class Lever:
    """One change that saves memory, and what it costs."""

    change: str
    total: int  # bytes with it
    price: str


@dataclass(frozen=True)
class PlannedTraining:
    """One way to train the model: bytes by part, and where they fit."""

    method: Method
    rank: int | None  # None for a full fine-tune
    targets: str | tuple[str, ...] | None
    batch: int
    length: int
    checkpointing: bool
    bytes: PlannedBytes
    trainable: int  # values
    share: float  # of the model's values
    exact: bool  # whether the real code was run on fake tensors
    fits: tuple[str, ...]  # names of GPUs
    largest_batch: int | None  # on the GPU that it is planned for; 0 where not even one row fits
    levers: tuple[Lever, ...]
    kind: str = LORA  # of adapter
    answers: int = 1  # to each prompt


def planned_bytes(shape: ModelShape, settings: PlanSettings, ratio: float = 1.0) -> PlannedBytes:
    """By the closed form. ``ratio``: measured to planned bytes of earlier runs on this machine."""
    static = static_memory(shape, settings)
    return assembled(static, activation_memory(shape, settings), settings, shape.layers, ratio)


def assembled(
    static: StaticMemory, activations: ActivationMemory, settings: PlanSettings, layers: int, ratio: float = 1.0
) -> PlannedBytes:
    """The parts at the fullest moment.

    In one backward activations are given back as gradients come: the fullest moment is at its begin, or at its end.
    Where gradients of the batch before are there already, it is at its begin, unless all gradients come at once.
    """
    at_begin = activations.stored + max(activations.layer, activations.head)
    last = activations.stored // layers + activations.layer
    copies = 2 * settings.copied_bytes * static.trainable  # of the adapter, and then of its gradients
    at_end = max(copies + last, copies + static.gradients) if copies else static.gradients + last
    if settings.accumulates:
        peak = static.gradients + max(at_begin, at_end if copies else 0)
    else:
        peak = max(at_begin, at_end)
    logits = max(0, min(activations.head - activations.layer, peak - static.gradients))
    parts = PlannedBytes(
        weights=static.weights,
        quantization_state=static.quantization_state,
        adapter=static.adapter,
        gradients=static.gradients,
        optimizer=static.optimizer,
        activations=peak - static.gradients - logits,
        logits=logits,
        context=0 if settings.on_cpu else CONTEXT,
    )
    return replace(parts, context=parts.context + round(parts.tensors * max(0.0, ratio - 1.0)))


def fits(total: int, gpu: GpuModel) -> bool:
    """Whether a GPU holds that many bytes."""
    return total <= gpu.memory * USABLE


def fitting_gpus(total: int) -> tuple[str, ...]:
    """Names of the GPUs that hold that many bytes, the smallest first."""
    return tuple(gpu.name for gpu in sorted(GPUS, key=lambda gpu: gpu.memory) if fits(total, gpu))


def largest_batch(shape: ModelShape, settings: PlanSettings, gpu: GpuModel, ratio: float = 1.0) -> int:
    """Rows of the largest micro-batch that the GPU holds; 0 where it does not hold one."""

    def holds(batch: int) -> bool:
        return fits(planned_bytes(shape, replace(settings, batch=batch), ratio).total, gpu)

    if not holds(1):
        return 0
    low, high = 1, 2
    while holds(high) and high < 1 << 16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def levers(shape: ModelShape, settings: PlanSettings, ratio: float = 1.0) -> tuple[Lever, ...]:
    """Each change alone that saves memory, with its price, in the order in which one would try them."""
    before = planned_bytes(shape, settings, ratio)
    tried = [
        Lever(change, planned_bytes(shape, changed, ratio).total, price)
        for change, price, changed in _changes(settings)
    ]
    if settings.shards == 1 and settings.method != "full" and settings.kind == LORA and not settings.dora:
        halved = planned_bytes(shape, replace(settings, shards=2), ratio).total
        price = "a second GPU; on each, not run on several GPUs yet"
        tried.append(Lever("train.parallel: fsdp, and two GPUs (--gpus 2)", halved, price))
    return tuple(lever for lever in tried if lever.total < WORTHWHILE * before.total)


def _changes(settings: PlanSettings) -> Iterator[tuple[str, str, PlanSettings]]:
    if not settings.checkpointing and settings.kind not in STATES:
        change, price = "train.gradient_checkpointing: true", "each layer is computed twice: about a third more time"
        yield change, price, replace(settings, checkpointing=True)
    if settings.batch > 1 and settings.objective != "kto":  # which compares the rows of a batch with each other
        rows = settings.batch
        change = f"train.batch_size: 1, train.accumulation: {rows} times what it was"
        yield change, "the same step, in smaller and slower pieces", replace(settings, batch=1, accumulates=True)
    if settings.method != "qlora" and settings.kind in ON_FOUR_BITS:
        change = "train.quantize: nf4" if settings.method == "lora" else "QLoRA instead of a full fine-tune"
        price = "4-bit weights in training, unpacked at every use"
        yield change, price, replace(settings, method="qlora")
    if settings.length > 256:
        change = f"data.max_length: {settings.length // 2}"
        yield change, "longer rows are cut", replace(settings, length=settings.length // 2)
    if settings.method != "full" and settings.kind == LORA and settings.rank > 8:
        change = f"train.lora.rank: {max(8, settings.rank // 2)}"
        yield change, "an adapter that can learn less", replace(settings, rank=max(8, settings.rank // 2))
    if settings.optimizer_bits == 32:
        change = "an AdamW with 8-bit state"
        yield change, "no setting of a recipe; its moments are rounded", replace(settings, optimizer_bits=8)


def first_that_fits(options: Sequence[Lever], gpu: GpuModel) -> Lever | None:
    """The first change after which the GPU holds the training."""
    return next((lever for lever in options if fits(lever.total, gpu)), None)
