"""What of a recipe and a device decides how much memory a training takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora2serve.config.objectives import SFT, Objective
from lora2serve.config.recipe import TrainRecipe
from lora2serve.config.train_methods import LORA, STATES

Method = Literal["full", "lora", "qlora"]
ComputeType = Literal["bfloat16", "float16", "float32"]  # a GPU takes the first that it has; a CPU float32
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")


@dataclass(frozen=True)
class PlanSettings:
    """One way to train a model. ``batch`` rows of ``length`` tokens go through it at once.

    Of ``objective`` dpo a row is two answers, each behind its prompt; of dpo and kto the base is asked for them, too.
    """

    method: Method = "qlora"
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    target_parameters: str | tuple[str, ...] = ()  # of experts
    batch: int = 8
    length: int = 1024
    checkpointing: bool = True
    accumulates: bool = False  # gradients of the batch before are there already
    double_quant: bool = True
    dropout: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    optimizer_bits: Literal[8, 32] = 32
    dtype: ComputeType = "bfloat16"
    trained_bytes: int = 4  # of one trained value of an adapter
    hoisted: bool = True  # whether the adapter is cast to what is computed in once a batch, as training does here
    padded: bool = True  # whether rows of several lengths go through at once, so that attention gets a mask
    kind: str = LORA  # of adapter: ``train.method``
    options: Mapping[str, object] = field(default_factory=dict)  # of another kind than lora
    objective: Objective = SFT
    shards: int = 1  # processes that each hold a part of the base
    new_tokens: int = 0  # rows of embedding and head that a LoRA trains beside it
    learned: int | None = None  # values of such an adapter, which its own code says

    @property
    def itemsize(self) -> int:
        """Bytes of a value that is computed."""
        return 4 if self.dtype == "float32" else 2

    @property
    def kept_bytes(self) -> int:
        """Bytes of a value that is not quantized: float32 beside a 4-bit base where training computes in float16."""
        return 4 if self.dtype == "float16" and self.method == "qlora" else self.itemsize

    @property
    def casts(self) -> bool:
        """Whether what goes into an adapter is cast for it: to its float32 by PEFT, and back by autocast."""
        narrow = self.kept_bytes < self.trained_bytes and self.method == "lora" and not self.copied_bytes
        return narrow or self.kept_bytes > self.itemsize

    @property
    def copied_bytes(self) -> int:
        """Of one trained value, in the copy of the adapter that is computed with."""
        is_lora = self.method != "full" and self.kind == LORA and not self.dora
        hoists = self.hoisted and is_lora and self.itemsize < self.trained_bytes
        return self.itemsize if hoists else 0

    @property
    def mask_bytes(self) -> int:
        """Of one value of a dropout's mask."""
        return 4 if self.on_cpu else 1

    @property
    def on_cpu(self) -> bool:
        """Whether it is planned for a CPU."""
        return self.dtype == "float32"

    @property
    def answers(self) -> int:
        """Sequences that a row is."""
        return 2 if self.objective == "dpo" else 1

    @property
    def tokens(self) -> int:
        """Tokens that go through the model at once."""
        return self.batch * self.answers * self.length


def settings_of(train: TrainRecipe, length: int, dtype: ComputeType, new_tokens: int = 0) -> PlanSettings:
    """What a recipe asks for, with rows of ``length`` tokens, on a device that computes in ``dtype``.

    new_tokens: how many ``data.new_tokens`` there are.
    """
    lora = train.lora
    method = method_of(train)
    return PlanSettings(
        method=method,
        rank=lora.rank,
        targets=lora.targets,
        target_parameters=lora.target_parameters,
        batch=train.batch_size,
        length=length,
        checkpointing=checkpoints(train, method),
        accumulates=train.accumulation > 1,
        padded=train.batch_size > 1 or train.objective != SFT,
        double_quant=train.double_quant,
        dropout=lora.dropout > 0,
        dora=lora.dora,
        modules_to_save=lora.modules_to_save,
        dtype=dtype,
        kind=train.method,
        options=train.options,
        objective=train.objective,
        new_tokens=new_tokens,
    )


def method_of(train: TrainRecipe) -> Method:
    """What a recipe trains."""
    return "lora" if train.quantize == "none" else "qlora"


def checkpoints(train: TrainRecipe, method: Method) -> bool:
    """Whether activations are computed twice to save memory: without a word in the recipe, with a 4-bit base."""
    if train.method in STATES:
        return False
    return method != "lora" if train.gradient_checkpointing is None else train.gradient_checkpointing
