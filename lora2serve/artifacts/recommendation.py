"""Which export to ship: for each place where exports are served, the smallest that meets its bounds, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.console import size, upper_first

if TYPE_CHECKING:
    from lora2serve.artifacts.parity_report import ComparisonResult, Gate

SERVED_IN = {
    "vllm": "vLLM",
    "adapter": "vLLM",
    "ollama": "Ollama",
    "ollama-adapter": "Ollama",
    "gguf": "llama.cpp",
    "gguf-adapter": "llama.cpp",
    "lmstudio": "LM Studio",
}
DEPLOYMENT = "url"  # the target of what runs already
UNROUNDED = ("float32", "bfloat16", "float16", "lora", "F32", "F16", "BF16")  # no type has more bits to offer

WORDS = {
    "mean_kl": "mean KL {} nats",
    "top1": "{} same top token",
    "equal_answers": "{} same answers",
    "retention": "{} of the signal kept",
}


@dataclass(frozen=True)
class Recommendation(JsonRecord):
    """The export to ship for one place where it is served; ``export`` is empty where none is proven."""

    WHOLE: ClassVar[bool] = True

    served_in: str
    export: str = ""
    size: int = 0  # bytes, of the base too where the export is an adapter on it
    reason: str = ""
    details: tuple[str, ...] = ()  # sentences: its figures and what the next larger one has, or why there is none

    @property
    def title(self) -> str:
        """``Ship for Ollama``."""
        return f"{'Ship' if self.export else 'Nothing to ship'} for {self.served_in}"

    @property
    def sentences(self) -> tuple[str, ...]:
        """The reason, and the details."""
        return (f"{upper_first(self.reason)}.", *self.details)


@dataclass(frozen=True)
class Candidate:
    """An export with all rows of it."""

    name: str
    size: int
    rows: Sequence[ComparisonResult]

    @property
    def met(self) -> bool:
        """Whether an engine says so, and none says otherwise."""
        return any(row.status == "met" for row in self.rows) and not any(row.red for row in self.rows)

    @property
    def worst(self) -> ComparisonResult:
        """The row furthest off."""
        return max(self.rows, key=_mean_kl)


def recommend(rows: Sequence[ComparisonResult]) -> tuple[Recommendation, ...]:
    """One for each place where an export here is served; none where no engine was to be asked or sizes are unknown."""
    places: dict[str, dict[str, list[ComparisonResult]]] = {}
    for row in rows:
        if row.engine and row.target != DEPLOYMENT and row.size:
            place = places.setdefault(SERVED_IN.get(row.target, row.target), {})
            place.setdefault(row.export, []).append(row)
    return tuple(
        _of_place(place, [Candidate(name, total(of_export[0]), of_export) for name, of_export in exports.items()])
        for place, exports in places.items()
    )


def total(row: ComparisonResult) -> int:
    """Bytes of what must be there to serve it."""
    return row.size + row.base_size


def _of_place(place: str, candidates: Sequence[Candidate]) -> Recommendation:
    proven = sorted(
        (candidate for candidate in candidates if candidate.met),
        key=lambda candidate: (candidate.size, _mean_kl(candidate.worst), candidate.name),
    )
    if not proven:
        return _none(place, candidates)
    first, *larger = proven
    details = [upper_first(_figures(first))]
    if larger:
        details.append(_step_up(larger[0]))
    unasked = [row for row in first.rows if row.status == "missing"]
    details += [f"Not asked in {row.engine}: {_missing(row)}." for row in unasked]
    return Recommendation(place, first.name, first.size, _reason(len(proven), len(candidates)), tuple(details))


def _reason(proven: int, count: int) -> str:
    if proven > 1:
        return f"the smallest of the {proven} that meet their bounds"
    return f"the only one of {count} that meets its bounds" if count > 1 else "it meets its bounds"


def _figures(candidate: Candidate) -> str:
    """Where it is furthest off."""
    row = candidate.worst
    checks = {name: row.check(name) for name in WORDS}
    parts = [WORDS[name].format(check.shown()) for name, check in checks.items() if check]
    return f"{', '.join(parts)}." if parts else f"proven in {row.engine}."


def _step_up(larger: Candidate) -> str:
    """What more bytes would bring."""
    return f"The next larger one is {larger.name}, {size(larger.size)}: {_figures(larger)}"


def _none(place: str, candidates: Sequence[Candidate]) -> Recommendation:
    rows = [row for candidate in candidates for row in candidate.rows]
    if all(row.status == "missing" for row in rows):
        reason = "none was measured: the engine is not here"
        return Recommendation(place, reason=reason, details=tuple(dict.fromkeys(map(_way_out, rows))))
    red = [row for row in rows if row.red]
    reason = "none meets its bounds" if len(candidates) > 1 else "it does not meet its bounds"
    if all(row.status == "missing" for row in red):
        reason = "a required engine is not here"
    return Recommendation(place, reason=reason, details=tuple(_way_out(row) for row in red))


def _way_out(row: ComparisonResult) -> str:
    """Why a row is red, and what to do."""
    if row.status == "missing":
        return f"{row.title}: {_missing(row)}."
    gate = row.gate
    assert gate is not None
    return f"{row.title}: {gate.cause or gate.first or gate.status}. Next: {_todo(row, gate)}."


def _todo(row: ComparisonResult, gate: Gate) -> str:
    missed = [check.name for check in gate.checks if check.met is False]
    if gate.status == "failed":
        return "see in its row what the engine said"
    if gate.name == "settings" or missed == ["first_difference"]:
        return "export it again, or allow with --allow what was changed on purpose"
    if gate.name == "behaviour" and row.kind not in UNROUNDED:
        return "export a type with more bits"
    return "export it again"


def _missing(row: ComparisonResult) -> str:
    gate = row.gate
    assert gate is not None
    reason = (gate.first or gate.status).removeprefix(f"{row.engine}: ")
    return f"{reason}{f' ({gate.cause})' if gate.cause else ''}"


def _mean_kl(row: ComparisonResult) -> float:
    check = row.check("mean_kl")
    return check.value if check else 0.0
