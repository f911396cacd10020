"""What the vLLM engine multiplies FP8 with on a CPU: torch's own code instead of oneDNN, with the same result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora2serve.parity_check.engines.vllm_engine import FP8, cpu_dtype, multiply_fp8_by_torch, packing


@pytest.fixture
def onednn() -> Iterator[None]:
    """As torch has it, before and afterwards."""
    assert torch.backends.mkldnn.enabled
    yield
    torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def random(rows: int, seed: int) -> torch.Tensor:
    """Whole numbers that FP8 has: their sums are exact in float32, in any order."""
    values = torch.randint(-16, 17, (rows, 256), generator=torch.Generator().manual_seed(seed))
    return values.float().to(torch.float8_e4m3fn)


@pytest.mark.usefixtures("onednn")
def test_the_same_products() -> None:
    left, right, one = random(5, 0), random(64, 1).t(), torch.ones(1)
    before = torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.float32)
    multiply_fp8_by_torch()
    after = torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.float32)
    assert torch.equal(before, after) and torch.equal(after.double(), left.double() @ right.double())
    other = torch._scaled_mm(random(5, 2), right, scale_a=one, scale_b=one, out_dtype=torch.float32)
    assert not torch.equal(after, other), "the control"


@pytest.mark.parametrize(
    ("format_", "dtype"), [(None, "float32"), (FP8, "float32"), ("int-quantized", "float32"), ("pack-quantized", "bfloat16")]
)  # fmt: skip
def test_how_a_model_is_stored(format_: str | None, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"format": format_}} if format_ else {}))
    assert (packing(str(tmp_path)), cpu_dtype(str(tmp_path))) == (format_, dtype)
