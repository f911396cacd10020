"""What an artifact was made from, the same in run.json and in a manifest: the base, the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora2serve.artifacts.json_record import JsonRecord


@dataclass(frozen=True)
class Fingerprint(JsonRecord):
    """sha256 of a model's config.json, and of the names and shapes of its tensors."""

    config: str | None = None
    tensors: str | None = None


@dataclass(frozen=True)
class BaseRecord(JsonRecord):
    """A base model: where it was, what it is called, and by what it is known again.

    ``files`` (sha256) and ``stat`` (size, time of last change) are those of its weights; empty where no byte was read.
    """

    path: str = ""
    id: str = ""
    revision: str | None = None
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    files: Mapping[str, str] = field(default_factory=dict)
    stat: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def local(self) -> Path | None:
        """Where it was, if that directory is still here."""
        return Path(self.path) if self.path and Path(self.path).is_dir() else None

    @property
    def pinned(self) -> str:
        """Its Hub id, at the commit that was used."""
        return f"{self.id}@{self.revision}" if self.revision else self.id


@dataclass(frozen=True)
class AdapterRecord(JsonRecord):
    """An adapter that was folded in: where it was, its repository and commit if the Hub's, sha256 of its files."""

    path: str = ""
    id: str | None = None
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """From what one model was made: the base, which of its weights, and the adapters in their order."""

    base: BaseRecord = field(default_factory=BaseRecord)
    run: str | None = None
    merge_base: Literal["trained", "original"] | None = None
    base_mismatch: str | None = None  # in what the base that was folded onto differs from the run's
    adapters: tuple[AdapterRecord, ...] = ()

    @property
    def adapter(self) -> AdapterRecord | None:
        """The first adapter."""
        return self.adapters[0] if self.adapters else None
