"""Our 4-bit dequantiser, on the CPU and without bitsandbytes, against bitsandbytes' CUDA kernels: every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora2serve.checkpoint import Checkpoint
from lora2serve.dequantize import Dequantized
from lora2serve.round_trip import RoundTrip
from tests.tiny import make_model

FOUR_BIT = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(scope="module", params=[256, 96])  # 96 is no multiple of 64: blocks run over the ends of rows
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    width: int = request.param
    path = tmp_path_factory.mktemp("base") / "base"
    return make_model(path, hidden_size=width, intermediate_size=width * 3 + 32)


def quantized(base: Path, kind: str, double: bool, dtype: torch.dtype) -> Any:
    """The model in CUDA memory, quantised there."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map={"": 0})


def by_cuda(model: Any) -> dict[str, torch.Tensor]:
    """Every quantised weight, dequantised by bitsandbytes' CUDA kernel into its own type."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert module.weight.data.is_cuda
            found[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state).cpu()
    return found


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_quantised_on_the_gpu(
    base: Path, tmp_path: Path, kind: str, double: bool, dtype: torch.dtype
) -> None:
    model = quantized(base, kind, double, dtype)
    oracle = by_cuda(model)
    model.save_pretrained(tmp_path / "q")
    source = Dequantized(Checkpoint(tmp_path / "q"))
    assert len(oracle) == 14
    for name, expected in oracle.items():
        assert torch.equal(source.read(name).to(dtype), expected), name
        assert torch.equal(source.read(name, slice(3, 41)).to(dtype), expected[3:41]), "any block of rows"
    name = next(iter(oracle))
    assert not torch.equal((source.read(name) * 1.01).to(dtype), oracle[name]), "the control"


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_round_trip_of_the_training_base(base: Path, kind: str, double: bool) -> None:
    """``--merge-base trained`` folds onto what the GPU trained on, though it never sees one.

    With double quantisation the mean of all scales is summed in another order on a GPU, so that its last bit, and
    with it the last bits of every weight, may differ; a scale that lies on the border of two 8-bit codes, too.
    """
    oracle = by_cuda(quantized(base, kind, double, torch.float32))
    modules = [name.removesuffix(".weight") for name in oracle]
    source = RoundTrip(Dequantized(Checkpoint(base)), modules, kind, 64, double)
    plain = Dequantized(Checkpoint(base))
    for name, expected in oracle.items():
        got = source.read(name).float()
        if double:
            near = torch.isclose(got, expected, rtol=1e-5, atol=1e-7)
            assert near.float().mean() > 0.999, name
        else:
            assert torch.equal(got, expected), name
        assert not torch.allclose(plain.read(name).float(), expected, rtol=1e-3), "the control: it is lossy"
