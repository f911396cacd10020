"""The report of one parity run: report.json (format 1, described in docs/parity.md) and what is made from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lora2serve.parity_check.gates import Gate, Metric
from lora2serve.parity_check.trained_model import ReferenceName

FORMAT = 1


@dataclass(frozen=True)
class PromptFigures:
    """One scored sequence."""

    part: str
    text: str  # its beginning
    kl: tuple[float, ...]  # by position, against the reference of the verdict
    tokens: tuple[str, ...] = ()  # of the texts with the largest KL: one more than ``kl``, whose first is the second's


@dataclass(frozen=True)
class Answer:
    """One greedy answer beside the reference's; ``parts`` is the token where they part, -1 nowhere."""

    prompt: str
    expected: str
    got: str
    parts: int


@dataclass(frozen=True)
class ComparisonResult:
    """One export in one engine."""

    export: str
    target: str
    kind: str  # the row of the threshold table
    engine: str
    version: str
    reference: ReferenceName
    gates: tuple[Gate, ...]
    beside: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)  # figures against the other reference
    parts: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)  # figures on task and on general text
    prompts: tuple[PromptFigures, ...] = ()
    answers: tuple[Answer, ...] = ()
    tensors: tuple[Mapping[str, Any], ...] = ()  # those with the largest error
    said: str = ""  # the answer to the user's own question
    seconds: float = 0.0
    required: bool = True  # whether a missing engine is red

    @property
    def status(self) -> str:
        """met, missed, failed or missing: that of the first gate that is not met."""
        return next((gate.status for gate in self.gates if gate.status not in ("met", "skipped")), "met")

    @property
    def red(self) -> bool:
        """Whether this row fails the run."""
        return self.status in ("missed", "failed") or (self.status == "missing" and self.required)

    @property
    def gate(self) -> Gate | None:
        """The first gate that is not met."""
        return next((gate for gate in self.gates if gate.status not in ("met", "skipped")), None)

    def check(self, name: str) -> Metric | None:
        """One figure of the behaviour gate."""
        return next((c for gate in self.gates if gate.name == "behaviour" for c in gate.checks if c.name == name), None)


@dataclass(frozen=True)
class ParityReport:
    """All rows and what they were measured with."""

    run: str
    data: Mapping[str, Any]
    references: Mapping[str, Any]
    subjects: tuple[ComparisonResult, ...]
    versions: Mapping[str, str]
    asked: Mapping[str, Any] = field(default_factory=dict)  # the user's own question: prompt, answers by name
    regressions: tuple[str, ...] = ()  # against --baseline

    @property
    def met(self) -> bool:
        """Whether a row is met, none is red, and nothing got worse: where no engine is here, nothing is proven."""
        proven = any(row.status == "met" for row in self.subjects)
        return proven and not any(row.red for row in self.subjects) and not self.regressions

    def json(self) -> dict[str, Any]:
        """The content of report.json."""
        content = asdict(self)
        for shown, row in zip(content["subjects"], self.subjects, strict=True):
            shown |= {"status": row.status, "red": row.red}
        content["rows"] = content.pop("subjects")
        return {"format": FORMAT, "met": self.met, **_finite(content)}


def _finite(value: Any) -> Any:
    """JSON has no infinity: text stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
