"""Everything that an evaluation, or a comparison of two models, is asked for, in one typed value each."""

from __future__ import annotations

from dataclasses import dataclass

from lora2serve.api.export_request import Named
from lora2serve.config.arguments import take_fields


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of ``lora2serve.evaluate``, which has them explained; no ``model``: ``runs/latest``."""

    model: tuple[Named, ...] | None = None
    against: Named | None = None
    suite: Named | None = None
    limit: int | None = None
    gate: tuple[str, ...] = ()
    task: tuple[str, ...] = ()
    task_folder: Named | None = None
    shots: int | None = None
    chat: bool = False
    engine: str = ""
    base: Named | None = None
    url_model: str | None = None
    allow_overlap: bool = False
    out: Named | None = None

    def __post_init__(self) -> None:
        """UsageError for values that no type checker has seen."""
        take_fields(self)


@dataclass(frozen=True)
class CompareRequest:
    """The arguments of ``lora2serve.compare``, which has them explained."""

    first: Named
    second: Named
    suite: Named | None = None
    limit: int | None = None
    gate: tuple[str, ...] = ()
    engine: str = ""
    base: Named | None = None
    url_model: str | None = None
    out: Named | None = None

    def __post_init__(self) -> None:
        """UsageError for values that no type checker has seen."""
        take_fields(self)
