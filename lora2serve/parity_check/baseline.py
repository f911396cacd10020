"""``--baseline``: what got worse than in an earlier report, beyond noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2serve.errors import InputError
from lora2serve.parity_check.report.parity_report import FORMAT, ComparisonResult, ParityReport
from lora2serve.parity_check.thresholds import LOWER

COMPARED = ("mean_kl", "p99_kl", "top1", "retention", "equal_answers", "tensor_nmse")
SMALLEST = 1e-6  # below, a difference is one of arithmetic (nats, or a share)


def regressions(report: ParityReport, earlier: Path) -> tuple[str, ...]:
    """One line for each figure whose interval lies wholly on the worse side of the earlier one's, and for lost rows."""
    before = _rows(earlier)
    now = {(row.export, row.engine): row for row in report.subjects}
    found = [
        f"{export} in {engine}: in {earlier}, and missing now"
        for export, engine in before
        if (export, engine) not in now
    ]
    for key, row in now.items():
        if key in before:
            found += _worse(row, before[key])
    return tuple(found)


def _worse(row: ComparisonResult, before: Mapping[str, Any]) -> list[str]:
    old = {check["name"]: check for gate in before["gates"] for check in gate["checks"]}
    if row.status != "met" and before["status"] == "met":
        return [f"{row.export} in {row.engine}: was met, is {row.status}"]
    found = []
    for gate in row.gates:
        for check in gate.checks:
            then = old.get(check.name)
            if check.name not in COMPARED or then is None or check.low is None or check.high is None:
                continue
            bad = (
                check.high < float(then["low"])
                if check.name in LOWER or check.name == "equal_answers"
                else check.low > float(then["high"])
            )
            if bad and abs(check.value - float(then["value"])) > SMALLEST:
                found.append(f"{row.export} in {row.engine}: {check.name} {then['value']:.4g} became {check.value:.4g}")
    return found


def _rows(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    expected = f"a report.json of format {FORMAT}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise InputError(f"{path}: format {content['format']!r}, expected {expected}", "make a new baseline")
        return {(row["export"], row["engine"]): row for row in content["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not {expected} ({error})", "`lora2serve parity` writes one") from None
