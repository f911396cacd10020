"""``evals/<suite>.json``: what a model reached on one suite, each figure with its interval.

Two scores are comparable where ``suite_sha256`` is the same: it stands for the rows, the scorer and the decoding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from lora2serve.artifacts.json_record import JsonRecord, read_text, required
from lora2serve.config.schema import show
from lora2serve.errors import InputError

FORMAT = 1
FOLDER = "evals"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True)
class SuiteFigure(JsonRecord):
    """One figure; ``low`` and ``high`` are the ends of its 95 % interval, ``n`` how many items it is of."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    higher_is_better: bool = True

    def misfits(self) -> Iterator[tuple[str, str]]:
        for key, value in (("value", self.value), ("low", self.low), ("high", self.high)):
            if value is not None and not math.isfinite(value):
                yield key, f"{value}, expected a finite number"
        if self.low is not None and self.high is not None and self.low > self.high:
            yield "low", f"{self.low}, expected at most high ({self.high})"


@dataclass(frozen=True, kw_only=True)
class SuiteScores(JsonRecord):
    """The whole file."""

    WHOLE: ClassVar[bool] = True
    COMPUTED: ClassVar[tuple[str, ...]] = ("format",)

    suite: str = required(str)
    suite_sha256: str = required(str)
    engine: str = ""  # and its version, such as "vllm 0.32.0"
    created: str = required(str)  # when it was measured, 2026-11-28T09:30:00Z
    metrics: Mapping[str, SuiteFigure] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The scores in that file; InputError where it is none of this format."""
        return cls.from_text(read_text(path), str(path))

    @classmethod
    def from_json(cls, value: object, source: str) -> Self:
        actual = value.get("format") if isinstance(value, dict) else value
        if actual != FORMAT:
            raise InputError(f"{source}: format {show(actual)}, expected {FORMAT}", "the scores of one suite as JSON")
        return super().from_json(value, source)

    def misfits(self) -> Iterator[tuple[str, str]]:
        for key, text, pattern, expected in (
            ("suite", self.suite, NAME, "letters, digits, '_' and '-'"),
            ("suite_sha256", self.suite_sha256, SHA256, "64 hexadecimal digits"),
            ("created", self.created, TIME, "a time like 2026-11-28T09:30:00Z"),
        ):
            if not pattern.fullmatch(text):
                yield key, f"{show(text)}, expected {expected}"
        for name in self.metrics:
            if not NAME.fullmatch(name):
                yield "metrics", f"{show(name)}, expected letters, digits, '_' and '-'"
        if not self.metrics:
            yield "metrics", "none, expected one at least"

    def to_json(self) -> dict[str, object]:
        return {"format": FORMAT, **super().to_json()}
