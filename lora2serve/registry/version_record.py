"""A version, its exports, scores and events, as they are read from the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from lora2serve.artifacts.json_record import JsonRecord

State = Literal["active", "retired", "collected"]


@dataclass(frozen=True)
class VersionExport(JsonRecord):
    """One export of a version; ``name`` is its target and type, such as gguf-Q4_K_M."""

    WHOLE: ClassVar[bool] = True

    name: str
    target: str
    quant: str | None
    bytes: int
    unproven: str  # why its parity is not proven; empty where it is


@dataclass(frozen=True)
class VersionScore(JsonRecord):
    """One figure on one suite; two are comparable where ``suite_sha256`` is the same."""

    WHOLE: ClassVar[bool] = True

    suite: str
    metric: str
    value: float
    low: float | None  # ends of the 95 % interval
    high: float | None
    n: int | None
    higher_is_better: bool
    suite_sha256: str
    engine: str
    created: str  # when it was measured, UTC

    @property
    def name(self) -> str:
        """``medqa.acc``"""
        return f"{self.suite}.{self.metric}"


@dataclass(frozen=True, kw_only=True)
class Version(JsonRecord):
    """What ``registry show`` prints. Times are UTC; ``state`` is "collected" once its files are removed."""

    WHOLE: ClassVar[bool] = True

    name: str
    number: int
    sha256: str
    state: State
    aliases: tuple[str, ...]
    domain: str
    task: str
    note: str
    author: str
    created: str
    added: str
    run: str
    base: str
    base_sha256: str
    method: str
    rank: int | None
    alpha: float | None
    learning_rate: float | None
    steps: int | None
    rows: int | None
    quantization: str
    bytes: int
    data_sha256: tuple[str, ...]  # of each file of rows that it was trained on
    exports: tuple[VersionExport, ...]
    scores: tuple[VersionScore, ...]
    targets: tuple[str, ...]
    data: Mapping[str, object]
    recipe: Mapping[str, object]
    versions: Mapping[str, str]

    @property
    def reference(self) -> str:
        """``medical-qa@7``"""
        return f"{self.name}@{self.number}"

    @property
    def folder(self) -> str:
        """What a directory of it is called, and a model: ``medical-qa-7``."""
        return f"{self.name}-{self.number}"

    @property
    def proven(self) -> bool:
        """Whether it has exports, and parity is met for all of them."""
        return bool(self.exports) and not any(export.unproven for export in self.exports)

    def score(self, metric: str, suite_sha256: str = "", since: str = "", until: str = "") -> VersionScore | None:
        """The newest of that name, such as ``medqa.acc``: on the suite whose sha256 begins so, in that period."""
        fitting = [
            score
            for score in self.scores
            if score.name == metric
            and score.suite_sha256.startswith(suite_sha256)
            and since <= score.created
            and (score.created < until or not until)
        ]
        return max(reversed(fitting), key=lambda score: score.created, default=None)  # of two, what was written last


@dataclass(frozen=True)
class RegistryEvent(JsonRecord):
    """What was done; ``old`` and ``new`` are numbers of versions."""

    WHOLE: ClassVar[bool] = True

    id: int
    at: str
    who: str
    kind: str
    name: str
    alias: str
    old: int | None
    new: int | None
    why: str
    overridden: str  # the gates that were not met, where --force went past them


@dataclass(frozen=True)
class JudgedGate(JsonRecord):
    """What one gate of a promotion says, and why."""

    WHOLE: ClassVar[bool] = True

    gate: str
    met: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class ChangedVersion(Version):
    """A version as a call leaves it, and what was written with it; of a dry run, as it would be."""

    events: tuple[RegistryEvent, ...]  # of its history, that the call wrote
    files: tuple[str, ...]  # paths in the version that are new, or have another content
    gates: tuple[JudgedGate, ...]  # of a promotion, as judged
    dry_run: bool

    @property
    def is_new(self) -> bool:
        """Whether no version had its content before."""
        return any(event.kind == "add" for event in self.events)

    @property
    def version(self) -> Version:
        """The version alone, as ``Registry.get`` returns it."""
        return Version(**{spec.name: getattr(self, spec.name) for spec in fields(Version)})
