"""report.json: what a comparison of exports with the trained model found, one row for each export and engine.

``parity/report/report.schema.json`` describes the format; within format 1 keys may be added, never taken away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from lora2serve.artifacts.json_record import JsonRecord, named, read_text, required
from lora2serve.artifacts.metric_table import figure
from lora2serve.artifacts.recommendation import Recommendation, recommend
from lora2serve.config.schema import show
from lora2serve.errors import InputError

FORMAT = 1
Status = Literal["met", "missed", "skipped", "failed", "missing"]
GateName = Literal["settings", "tokens", "tensors", "behaviour"]
GATES: tuple[GateName, ...] = get_args(GateName)  # the cheapest first
PartName = Literal["task", "general"]  # of the scored texts
ReferenceName = Literal["trained", "original"]
TRAINED = "trained"  # who answers the user's question: the model as trained ...
ON_FULL_PRECISION = "trained, on the full-precision base"  # ... and the same adapter there, if that is another base


def without_empty(content: dict[str, object], added: Sequence[str], key_order: Sequence[str]) -> dict[str, object]:
    """``content`` without the ``added`` keys (that earlier versions did not write) where they say nothing."""
    empty = {key for key in added if not content.get(key) and key not in key_order}
    return {key: value for key, value in content.items() if key not in empty}


@dataclass(frozen=True)
class Metric(JsonRecord):
    """One figure against its bound; ``met`` is None where it is shown only."""

    WHOLE: ClassVar[bool] = True

    name: str
    value: float
    low: float | None = None  # ends of the confidence interval
    high: float | None = None
    bound: float | None = None
    met: bool | None = None
    unjudged: str = ""  # why it has no bound here, where its format has one

    def shown(self) -> str:
        """The value as tables have it; ``-`` where it cannot be told."""
        return figure(self.name, self.value) or "-"

    def to_json(self) -> dict[str, object]:
        return without_empty(super().to_json(), ("unjudged",), self.key_order)


@dataclass(frozen=True)
class Gate(JsonRecord):
    """The verdict of one gate: where the first difference is, and its likely cause."""

    WHOLE: ClassVar[bool] = True

    name: GateName
    status: Status
    checks: tuple[Metric, ...] = ()
    first: str = ""
    cause: str = ""


@dataclass(frozen=True)
class PromptFigures(JsonRecord):
    """One scored text."""

    WHOLE: ClassVar[bool] = True

    part: PartName
    text: str  # its beginning
    kl: tuple[float, ...]  # by position, against the reference of the verdict
    tokens: tuple[str, ...] = ()  # of the texts with the largest KL: one more than ``kl``, whose first is the second's

    def misfits(self) -> Iterator[tuple[str, str]]:
        if self.tokens and not 1 < len(self.tokens) == len(self.kl) + 1:
            yield "tokens", f"{len(self.tokens)} beside {len(self.kl)} values of kl, expected one more"


@dataclass(frozen=True)
class GreedyAnswer(JsonRecord):
    """One greedy answer beside the reference's; ``parts`` is the token where they part, -1 nowhere."""

    prompt: str
    expected: str
    got: str
    parts: int


@dataclass(frozen=True)
class TensorError(JsonRecord):
    """How far one stored tensor is from the planned one."""

    WHOLE: ClassVar[bool] = True

    name: str
    nmse: float
    worst: float  # NMSE of the worst 256 values
    largest: float  # largest absolute difference
    strength: float | None = None  # how much of the adapter's change is there; None where it changes nothing
    deviation: float | None = None  # the standard error of that
    own: float | None = None  # NMSE of what this machine's quantizer makes of the planned values; None: not quantized
    lost: int = 0  # runs of 256 values that have nothing of the planned ones
    source: str = ""  # the model's name of it


@dataclass(frozen=True)
class SettingDifference(JsonRecord):
    """A value beside the weights that is not the planned one; ``key`` is empty where it is the whole file."""

    WHOLE: ClassVar[bool] = True

    file: str
    key: str
    planned: str
    actual: str
    allowed: str = ""  # the pattern of ``parity.allow`` that accepts it

    @property
    def path(self) -> str:
        """What ``parity.allow`` names it by."""
        return f"{self.file}:{self.key}" if self.key else self.file

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        return f"{where} is {self.actual}, planned {self.planned}"


@dataclass(frozen=True)
class ComparisonResult(JsonRecord):
    """One export in one engine; ``engine`` is empty where only its settings were compared."""

    WHOLE: ClassVar[bool] = True
    COMPUTED: ClassVar[tuple[str, ...]] = ("status", "red")

    export: str
    target: str = ""
    kind: str = ""  # the row of the threshold table
    engine: str = ""
    version: str = ""
    reference: ReferenceName = "original"
    gates: tuple[Gate, ...] = ()
    beside: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)  # figures against the other reference
    parts: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)  # figures on task and on general text
    prompts: tuple[PromptFigures, ...] = ()
    answers: tuple[GreedyAnswer, ...] = ()
    tensors: tuple[TensorError, ...] = ()  # those with the largest error
    settings: tuple[SettingDifference, ...] = ()  # beside the weights, those that are allowed too
    not_compared: tuple[str, ...] = ()  # of the settings, and what an engine that is not here was not asked
    reply: str = named("said", "")  # the answer to the user's own question
    seconds: float = 0.0
    required: bool = True  # whether a missing engine is red
    computed: str = ""  # what the engine had otherwise than ``serve`` starts it with: its type, LongRoPE's factors
    size: int = 0  # bytes of the export's files; 0: not known
    base_size: int = 0  # bytes of the base's weights, where the export is an adapter that is served on it
    speed: float = 0.0  # tokens per second of the answers, one answer at a time; 0: not measured
    same_files: str = ""  # the export with equal files, whose answers of the engine these are

    @property
    def title(self) -> str:
        """The export and its engine."""
        return f"{self.export} in {self.engine}" if self.engine else self.export

    @property
    def status(self) -> Status:
        """met, missed, failed or missing: that of the first gate that is not met."""
        return self.gate.status if self.gate else "met"

    @property
    def red(self) -> bool:
        """Whether this row fails the run."""
        return self.status in ("missed", "failed") or (self.status == "missing" and self.required)

    @property
    def gate(self) -> Gate | None:
        """The first gate that is not met."""
        return next((gate for gate in self.gates if gate.status not in ("met", "skipped")), None)

    def check(self, name: str) -> Metric | None:
        """One figure of the behavior gate."""
        checks = (check for gate in self.gates if gate.name == "behaviour" for check in gate.checks)
        return next((check for check in checks if check.name == name), None)

    def to_json(self) -> dict[str, object]:
        content = without_empty(super().to_json(), ("settings", "not_compared", "same_files"), self.key_order)
        return content | {"status": self.status, "red": self.red}


@dataclass(frozen=True)
class ScoredData(JsonRecord):
    """What was scored: predicted tokens, those of held-out rows and of general text, texts, prompts."""

    positions: int = 0
    requested: int = named("asked", 0)  # tokens that were asked for
    task: int = 0
    general: int = 0
    sequences: int = 0
    conversations: int = 0
    prompts: int = 0
    window: int = 0  # tokens of one text at most
    long: int = 0  # tokens of the text near the model's length; 0: there was none
    context: int | None = None  # the model's length; None where it names no limit


@dataclass(frozen=True)
class ReferenceInfo(JsonRecord):
    """What a reference was computed with."""

    version: str = ""
    vocab: int = 0


@dataclass(frozen=True)
class Question(JsonRecord):
    """The user's own question, and who answered what; empty where there was none."""

    prompt: str = ""
    answers: Mapping[str, str] = field(default_factory=dict)

    def expected(self, reference: ReferenceName) -> str | None:
        """What that reference answered; where there was one reference, its answer."""
        return self.answers.get(ON_FULL_PRECISION if reference == "original" else TRAINED, self.answers.get(TRAINED))


@dataclass(frozen=True, kw_only=True)
class ParityReport(JsonRecord):
    """All rows and what they were measured with."""

    WHOLE: ClassVar[bool] = True
    COMPUTED: ClassVar[tuple[str, ...]] = ("format", "met", "recommendations")

    run: str = ""
    data: ScoredData = field(default_factory=ScoredData)
    references: Mapping[str, ReferenceInfo] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    question: Question = field(default_factory=Question, metadata={"key": "asked"})
    regressions: tuple[str, ...] = ()  # against --baseline
    rows: tuple[ComparisonResult, ...] = required(tuple)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The report in that file; InputError where it is none of this format."""
        return cls.from_text(read_text(path), str(path))

    @classmethod
    def from_json(cls, value: object, source: str) -> Self:
        actual = value.get("format") if isinstance(value, dict) else value
        if actual != FORMAT:
            raise InputError(f"{source}: format {show(actual)}, expected {FORMAT}", "`lora2serve parity` writes one")
        return super().from_json(value, source)

    @property
    def met(self) -> bool:
        """Whether a row is met, none is red, and nothing got worse: where no engine is here, nothing is proven."""
        proven = any(row.status == "met" for row in self.rows)
        return proven and not any(row.red for row in self.rows) and not self.regressions

    @property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """Which export to ship, for each place where one is served."""
        return recommend(self.rows)

    def to_json(self) -> dict[str, object]:
        content = super().to_json()
        if self.recommendations:
            content = {"recommendations": [item.to_json() for item in self.recommendations], **content}
        return {"format": FORMAT, "met": self.met, **content}
