"""The verdict on an export's tensors: equal to the byte where they can be made again, else within bounds by their type.

How much of the adapter is in them is judged where they are not equal, whatever their type: its strength is measured
against what this machine's quantizer makes of the plan, so that rounding, which both have, does not hide it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.artifacts.parity_report import Gate, Metric, TensorError
from lora2serve.parity_check.thresholds import Thresholds

SHARP = 10  # the worst 256 values of a tensor may be so many times further off than the worst tensor
PLAIN = 3e-8  # NMSE of a tensor that is not quantized: one value in a thousand rounded the other way to bf16
FITTED = 2.5  # times the error of this machine's quantizer: what weights for the columns, or a fit to data, may cost
CERTAIN = 5.0  # standard errors: one sound tensor in two million is further off
LEAST = 0.002  # a standard error; a smaller one would outweigh all others in a mean
SURE = 0.05  # of the strength: a smaller difference is not one of alpha
NOT_APPLIED = "adapter: not applied; the stored weights are the base's"
TOO_COARSE = "rounding: stored more coarsely than its name says"


@dataclass(frozen=True)
class TensorFigures(JsonRecord):
    """What ``TensorComparator`` finds."""

    compared: int = 0
    reason: str = ""  # why the export could not be made again; empty: it was
    names: tuple[str, ...] = ()  # missing, not planned
    kinds: tuple[str, ...] = ()  # stored in another type or shape
    coarser: bool = False  # than planned
    different: Mapping[str, str] = field(default_factory=dict)  # tensors whose bytes are not the planned ones, in words
    tensors: tuple[TensorError, ...] = ()  # the worst first; none where all is equal


def tensors(found: TensorFigures, bounds: Thresholds) -> Gate:
    """The stored tensors against the planned ones."""
    count = Metric("tensors", found.compared)
    if found.names:
        return Gate("tensors", "missed", (count,), _more(found.names), "names: not those that were planned")
    if found.kinds:
        cause = TOO_COARSE if found.coarser else "types: not those that its name stands for"
        return Gate("tensors", "missed", (count,), _more(found.kinds), cause)
    if found.reason:
        return _bounded(found, bounds, (count, Metric("repeated", 0.0)))
    equal = 1 - len(found.different) / found.compared if found.compared else 1.0
    measured = _measured(found.tensors, bounds)
    checks = (count, Metric("equal_tensors", equal, equal, equal, 1.0, not found.different), *measured)
    if found.different:
        return Gate("tensors", "missed", checks, *_words(found))
    if any(check.met is False for check in measured):
        return Gate("tensors", "missed", checks, *_too_coarse(found.tensors))
    return Gate("tensors", "met", checks)


def _more(lines: Sequence[str]) -> str:
    return lines[0] + (f" and {len(lines) - 1} more" if len(lines) > 1 else "")


def _measured(errors: Sequence[TensorError], bounds: Thresholds) -> tuple[Metric, ...]:
    if not errors:
        return ()
    limit = bounds.tensor_nmse
    whole, part = max(error.nmse for error in errors), max(error.worst for error in errors)
    return (
        _at_most("tensor_nmse", whole, limit),
        _at_most("block_nmse", part, None if limit is None else SHARP * limit),
    )


def _at_most(name: str, value: float, bound: float | None) -> Metric:
    return Metric(name, value, value, value, bound, None if bound is None else value <= bound)


def _words(found: TensorFigures) -> tuple[str, str]:
    """Where the bytes differ, and what that looks like."""
    known = [error for error in found.tensors if set(error.name.split(" and ")) & found.different.keys()]
    if not known:
        return _more([*found.different.values()]), "damaged: bytes are not what was planned"
    whole = max(known, key=lambda error: (error.nmse if error.own is None else _excess(error), error.nmse))
    text = next(line for name, line in found.different.items() if name in whole.name.split(" and "))
    cause = _cause([error.name for error in known], found.tensors, whole.nmse)
    return f"{text}; NMSE {whole.nmse:.3g}", cause


def _other_strength(value: float) -> str:
    return f"scale: the adapter is there at {value:.2f} of its strength (alpha, rsLoRA, folded twice)"


def _excess(error: TensorError) -> float:
    return error.nmse / error.own if error.own else error.nmse


def _bounded(found: TensorFigures, bounds: Thresholds, counts: tuple[Metric, ...]) -> Gate:
    """An export that cannot be made again."""
    errors, limit = found.tensors, bounds.tensor_nmse
    strengths = list(_strengths(errors))
    checks = (*counts, *_measured([error for error in errors if error.own is not None] or errors, bounds))
    checks += tuple(_shown(strength) for strength in strengths[:1])
    worst = max(strengths, key=lambda strength: strength.certain, default=None)  # one module, or all of them
    bad = [error for error in errors if _outside(error, limit)]
    if worst and worst.wrong and not any(error.own is None or error.lost for error in bad):
        return Gate("tensors", "missed", checks, str(worst), worst.cause)
    if bad:
        whole = max(bad, key=lambda error: error.nmse)
        part = f", 256 values with {whole.worst:.3g}" if whole.worst > whole.nmse else ""
        cause = _cause([error.name for error in bad], errors, whole.nmse)
        return Gate("tensors", "missed", checks, f"{whole.name}: NMSE {whole.nmse:.3g}{part}", cause)
    if any(check.met is False for check in checks):
        return Gate("tensors", "missed", checks, *_too_coarse(errors))
    return Gate("tensors", "met", checks, cause=f"not compared to the byte: {found.reason}")


def _too_coarse(errors: Sequence[TensorError]) -> tuple[str, str]:
    return f"{errors[0].name}: NMSE {errors[0].nmse:.3g}", "rounding: stored more coarsely than its bound allows"


def _outside(error: TensorError, limit: float | None) -> bool:
    """Further off than its type, or than a tensor that is not quantized may be."""
    if error.own is None:
        return error.nmse > (limit if limit is not None and 0 < limit < PLAIN else PLAIN)
    far = error.nmse > FITTED * error.own and error.nmse > 2 * PLAIN
    return far or error.lost > 0


@dataclass(frozen=True)
class Strength:
    """How much of the adapter's change is in some tensors: 1 as planned, 0 none; with its standard error."""

    where: str
    value: float
    deviation: float

    @property
    def wrong(self) -> bool:
        """Whether it cannot be as planned."""
        return self.certain > 0 and abs(self.value - 1) > SURE

    @property
    def certain(self) -> float:
        """How far it is from 1 at least."""
        return abs(self.value - 1) - CERTAIN * self.deviation

    @property
    def cause(self) -> str:
        if abs(self.value) <= max(CERTAIN * self.deviation, SURE):
            return NOT_APPLIED
        return _other_strength(self.value)

    def __str__(self) -> str:
        low, high = (self.value + side * CERTAIN * self.deviation for side in (-1, 1))
        return f"{self.where}: {self.value:.2f} of the adapter's strength, between {low:.2f} and {high:.2f}"


def _strengths(errors: Sequence[TensorError]) -> Iterator[Strength]:
    """Of all tensors together, of each kind of module, and of each tensor."""
    known = [error for error in errors if error.strength is not None and _finite(error.deviation)]
    by_kind: dict[str, list[TensorError]] = defaultdict(list)
    for error in known:
        by_kind[re.sub(r"\d+", "*", error.name)].append(error)
    groups: list[tuple[str, Iterable[TensorError]]] = [("all tensors", known), *by_kind.items()]
    groups += [(error.name, [error]) for error in known]
    for where, group in groups:
        strength = _together(where, list(group))
        if strength:
            yield strength


def _together(where: str, errors: Sequence[TensorError]) -> Strength | None:
    """The mean, each weighted by how sure it is."""
    parts = [(error.strength or 0.0, max(error.deviation or 0.0, LEAST)) for error in errors]
    weights = np.array([1 / deviation**2 for _, deviation in parts])
    if not len(weights):
        return None
    return Strength(
        where, float(np.average([value for value, _ in parts], weights=weights)), float(weights.sum() ** -0.5)
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shown(strength: Strength) -> Metric:
    low, high = (strength.value + side * CERTAIN * strength.deviation for side in (-1, 1))
    return Metric("strength", strength.value, low, high, None, None)


def _cause(bad: Sequence[str], errors: Sequence[TensorError], nmse: float) -> str:
    if nmse == float("inf"):
        return "dtype: NaN, infinity or zeros in the export's weights"
    known: Mapping[str, float] = {error.name: error.strength for error in errors if error.strength is not None}
    strengths = np.array(list(known.values()))
    middle = float(np.median(strengths)) if len(strengths) else 1.0
    alike = bool(len(strengths)) and float(np.quantile(np.abs(strengths - middle), 0.9)) < 0.02
    if alike and abs(middle) < 0.02:
        return NOT_APPLIED
    if alike and abs(middle - 1) > 0.02:
        return _other_strength(middle)
    if len(bad) <= max(2, len(errors) // 8):
        return f"one part is damaged, transposed or another layer's: {', '.join(bad[:3])}"
    if nmse > 0.15 or not alike:  # ggml's two-bit types reach 0.1
        return "wrong base or damaged weights: the stored tensors are not the planned ones"
    return TOO_COARSE
