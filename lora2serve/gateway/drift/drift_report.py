"""The result of a comparison of windows: report.json, and report.html, one file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.gateway.drift.drift_test import LEVEL, PERMUTATIONS, SMALLEST, FeatureDrift
from lora2serve.system.small_files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE, RECORD = "report.html", "report.json"
MEANINGS = {
    "prompt.length": "characters of a prompt",
    "prompt.language": "the language of a prompt",
    "prompt.unseen": "part of a prompt's word pairs that were rare in the reference",
    "answer.length": "characters of an answer",
    "answer.language": "the language of an answer",
    "answer.finish": "why an answer ended",
    "answer.refusal": "answers that begin with a refusal",
    "answer.empty": "answers without text",
    "answer.json": "whether an answer is JSON",
    "answer.repetition": "part of an answer's runs of four words that are repeated",
    "answer.logprob": "mean log-probability of an answer's tokens",
}


@dataclass(frozen=True)
class DriftReport(JsonRecord):
    """What became of a version's traffic since it was promoted; ``reference`` and ``current`` say which requests."""

    WHOLE: ClassVar[bool] = True

    format: int
    name: str
    version: int
    created: str
    reference: str
    current: str
    features: tuple[FeatureDrift, ...]

    @property
    def drifted(self) -> tuple[FeatureDrift, ...]:
        """The features that are not what they were."""
        return tuple(each for each in self.features if each.drifted)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if not self.features:
            return "The last window is the reference from now on; there is nothing to compare with it yet."
        if not self.drifted:
            return f"Nothing drifted of {len(self.features)} features that were compared."
        return f"{len(self.drifted)} of {len(self.features)} features drifted: {', '.join(map(change, self.drifted))}."


def change(feature: FeatureDrift) -> str:
    """``answer.length (median 120 -> 156)``."""
    if feature.kind == "category":
        most = max(feature.bins, key=lambda each: abs(each.current - each.reference))
        return f"{feature.feature} ({most.label} {most.reference:.0%} -> {most.current:.0%})"
    if feature.kind == "share":
        return f"{feature.feature} ({feature.reference:.1%} -> {feature.current:.1%})"
    return f"{feature.feature} (median {feature.reference:.3g} -> {feature.current:.3g})"


def write_report(report: DriftReport, folder: Path) -> Path:
    """Write both files, each whole or not at all; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((RECORD, report.to_text(indent=1)), (PAGE, render_report(report))):
        write_text(folder / name, text)
    return folder / PAGE


def render_report(report: DriftReport) -> str:
    """The page; ``templates/drift.html.j2`` is its form."""
    page = _environment().get_template("drift.html.j2")
    return page.render(report=report, level=LEVEL, permutations=PERMUTATIONS, smallest=SMALLEST)


@cache  # its templates are compiled once
def _environment() -> Environment:
    from lora2serve.parity_check.report.html_page import page_environment

    environment = page_environment("lora2serve.gateway.drift")
    environment.globals |= {"change": change, "meanings": MEANINGS}
    return environment
