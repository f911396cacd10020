"""run.json: what one fine-tune was made from and with, and what it reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.artifacts.lineage import AdapterRecord, BaseRecord


@dataclass(frozen=True)
class DataSource(JsonRecord):
    """Rows that were trained on or held out."""

    path: str = ""
    sha256: str | None = None
    rows: int = 0
    revision: str | None = None  # of a data set on the Hub
    parts: tuple[DataSource, ...] = ()  # where it is mixed of several: each with its rows after weighting


@dataclass(frozen=True)
class DataRecord(JsonRecord):
    """Both sets."""

    train: DataSource | None = None
    eval: DataSource | None = None


@dataclass(frozen=True)
class QuantizationRecord(JsonRecord):
    """How bitsandbytes held the base in training: nf4, fp4 or int8."""

    WHOLE: ClassVar[bool] = True

    type: str
    double_quant: bool = False
    block_size: int = 64
    compute_dtype: str = "float32"
    modules: tuple[str, ...] = ()  # those that were really replaced
    experts: tuple[str, ...] = ()  # weights of experts, each expert quantized by itself


@dataclass(frozen=True)
class EvalLoss(JsonRecord):
    """Mean negative log-likelihood of the held-out tokens, and its exponential."""

    WHOLE: ClassVar[bool] = True

    eval_loss: float
    perplexity: float
    tokens: int = 0


@dataclass(frozen=True)
class LossDifference(JsonRecord):
    """Of two eval losses in nats, paired over the same rows, and the ends of its 95 % interval."""

    WHOLE: ClassVar[bool] = True

    mean: float
    low: float
    high: float
    rows: int = 0


@dataclass(frozen=True)
class PreferenceFigures(JsonRecord):
    """Of held-out pairs of answers, or answers with a label, on the base as trained: means over them all.

    loss: of TRL. chosen, rejected: rewards, beta times the change of an answer's log-probability in nats (None where no
    answer is right, or none is wrong); margin: the one less the other. accuracy: the share of pairs whose margin is
    above zero, None for answers with a label.
    """

    WHOLE: ClassVar[bool] = True

    loss: float
    margin: float | None = None
    accuracy: float | None = None
    chosen: float | None = None
    rejected: float | None = None
    rows: int = 0

    def in_words(self) -> str:
        """As a run says them."""
        parts = []
        if self.accuracy is not None:
            parts.append(f"{self.accuracy:.0%} of {self.rows:,} held-out pairs have the chosen answer in front")
        if self.margin is not None:
            parts.append(f"margin {self.margin:.3f}")
        return ", ".join([*parts, f"loss {self.loss:.4f}"])


@dataclass(frozen=True)
class RunMetrics(JsonRecord):
    """The base before training; the tuned model, on the base as trained and on the full-precision base.

    Of preferences they are of the answers that are right, and ``preference`` is of both.
    """

    base: EvalLoss | None = None
    tuned: EvalLoss | None = None
    tuned_on_original: EvalLoss | None = None
    tuned_less_tuned_on_original: LossDifference | None = None
    preference: PreferenceFigures | None = None

    def with_loss(self, name: str, loss: EvalLoss) -> RunMetrics:
        """With one of them measured, by its name."""
        return RunMetrics.from_json({**self.to_json(), name: loss.to_json()}, "metrics")

    def measured(self) -> dict[str, EvalLoss]:
        """Those that were measured, by name."""
        losses = {"base": self.base, "tuned": self.tuned, "tuned_on_original": self.tuned_on_original}
        return {name: loss for name, loss in losses.items() if loss}


@dataclass(frozen=True)
class MemoryRecord(JsonRecord):
    """Bytes of torch's allocator on a GPU at the fullest moment of the training."""

    WHOLE: ClassVar[bool] = True

    device: str
    planned_bytes: int | None = None  # None for a model that no plan could be made of
    peak_bytes: int = 0


@dataclass(frozen=True)
class LoopRecord(JsonRecord):
    """How an optimizer step is done, which --resume goes on with."""

    WHOLE: ClassVar[bool] = True

    optimizer: str
    checkpointing: bool  # whether activations are computed twice
    rows: int = 1  # that go through the model at once
    accumulation: int = 1  # of them in a step
    processes: int = 1  # each of which does that
    compiled: bool | None = None  # whether decoder layers are; None until the number of steps is known
    sharded: bool = False  # whether each of them has a part of the base, and not all of it
    varlen: bool | None = None  # whether rows are not padded, and attend by themselves; None until the model was asked


@dataclass(frozen=True)
class SpeedRecord(JsonRecord):
    """Tokens that are no padding, over the seconds of optimizer steps; evaluations and the first step left out.

    share_of_limit: 4 operations a parameter and token, over what a large product of matrices reached on that GPU.
    """

    WHOLE: ClassVar[bool] = True

    tokens_per_second: float
    share_of_limit: float | None = None  # None without a GPU


@dataclass(frozen=True)
class RunRecord(JsonRecord):
    """The whole file; empty before training has begun."""

    name: str = ""
    base: BaseRecord = field(default_factory=BaseRecord)
    from_adapter: AdapterRecord | None = None  # whose training went on
    data: DataRecord = field(default_factory=DataRecord)
    quantization: QuantizationRecord | None = None
    device: str | None = None  # cpu or cuda
    day: str | None = None  # that the chat template printed, YYYY-MM-DD; None where it prints no date
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: RunMetrics = field(default_factory=RunMetrics)
    loop: LoopRecord | None = None
    memory: MemoryRecord | None = None  # of a GPU
    speed: SpeedRecord | None = None
    steps: int | None = None
    finished: bool = False
