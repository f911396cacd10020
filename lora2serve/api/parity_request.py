"""Everything that parity is asked for, in one typed value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora2serve.api.export_request import Named
from lora2serve.config.arguments import take_fields
from lora2serve.errors import UsageError


@dataclass(frozen=True)
class ParityRequest:
    """The arguments of ``lora2serve.parity``, which has them explained."""

    model: Named | None = None
    exports: tuple[Named, ...] = ()
    base: Named | None = None
    data: Named | None = None
    engines: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    url: str | None = None
    url_model: str | None = None
    ask: str = ""
    baseline: Named | None = None
    gate: Literal["settings"] | None = None
    allow: tuple[str, ...] = ()
    report_dir: Named | None = None

    def __post_init__(self) -> None:
        """UsageError for values that no type checker has seen, and for what only engines answer where none is asked."""
        take_fields(self)
        of_engines = {
            "engine": self.engines, "require": self.require, "threshold": self.thresholds, "url": self.url,
            "url-model": self.url_model, "ask": self.ask, "data": self.data, "baseline": self.baseline,
        }  # fmt: skip
        given = [name for name, value in of_engines.items() if value]
        if self.gate and given:
            raise UsageError(f"--gate {self.gate} with --{given[0]}: the settings are compared without an engine")
