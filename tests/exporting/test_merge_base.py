"""Which base `--merge-base auto` folds onto: the trained one where it is better beyond noise."""

from __future__ import annotations

import math

import pytest

from lora2serve.artifacts.run_record import EvalLoss, LossDifference, QuantizationRecord, RunMetrics, RunRecord
from lora2serve.exporting.open_model import decide_merge_base


def record(trained: float, original: float, apart: LossDifference | None, kind: str = "nf4") -> RunRecord:
    metrics = RunMetrics(
        tuned=EvalLoss(trained, math.exp(trained)),
        tuned_on_original=EvalLoss(original, math.exp(original)),
        tuned_less_tuned_on_original=apart,
    )
    return RunRecord(quantization=QuantizationRecord(kind), metrics=metrics)


@pytest.mark.parametrize(
    ("trained", "original", "apart", "expected", "noise"),
    [
        (0.10, 0.30, LossDifference(-0.20, -0.25, -0.15, 40), "trained", False),
        (0.30, 0.10, LossDifference(0.20, 0.15, 0.25, 40), "original", False),
        (0.10, 0.11, LossDifference(-0.01, -0.03, 0.01, 40), "original", True),
        (0.11, 0.10, LossDifference(0.01, -0.01, 0.03, 40), "original", True),
        (0.10, 0.30, LossDifference(-0.20, -math.inf, math.inf, 2), "original", True),  # two rows say nothing
        (0.10, 0.30, None, "trained", False),  # a run of an earlier release
        (0.30, 0.10, None, "original", False),
    ],
)
def test_auto(trained: float, original: float, apart: LossDifference | None, expected: str, noise: bool) -> None:
    merge_base, why = decide_merge_base(record(trained, original, apart), "auto")
    assert merge_base == expected
    assert f"{original:.4f} on the original, {trained:.4f} on the trained" in why
    assert ("do not differ beyond noise" in why) == noise
    if noise and apart:
        assert f"over {apart.rows} held-out rows" in why


def test_what_decides_before_the_losses() -> None:
    better = LossDifference(-0.2, -0.25, -0.15, 40)
    assert decide_merge_base(record(0.1, 0.3, better), "original") == ("original", "as requested")
    assert decide_merge_base(record(0.1, 0.3, better, "fp4"), "auto")[0] == "original"
    assert decide_merge_base(RunRecord(), "auto")[0] == "original"
    assert decide_merge_base(RunRecord(quantization=QuantizationRecord("nf4")), "auto")[0] == "original"
