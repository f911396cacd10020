"""Our 4-bit dequantizer, on the CPU and without bitsandbytes, against bitsandbytes' CUDA kernels: every bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora2serve.weights.bnb import cuda_quantize
from lora2serve.weights.bnb.fake_quantized import FakeQuantized, Quantization
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized, nibbles
from lora2serve.weights.tensors import DType, torch_dtype
from tests.support.tiny import make_model

FOUR_BIT = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(scope="module", params=[256, 96])  # 96 is no multiple of 64: blocks run over the ends of rows
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    width: int = request.param
    path = tmp_path_factory.mktemp("base") / "base"
    return make_model(path, hidden_size=width, intermediate_size=width * 3 + 32)


def quantized(base: Path, kind: str, double: bool, dtype: torch.dtype) -> Any:
    """The model in CUDA memory, quantized there."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map={"": 0})


def by_cuda(model: Any) -> dict[str, torch.Tensor]:
    """Every quantized weight, dequantized by bitsandbytes' CUDA kernel into its own type."""
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
        assert torch.equal(source.read(name).values.to(dtype), expected), name
        assert torch.equal(source.read(name, slice(3, 41)).values.to(dtype), expected[3:41]), "any block of rows"
    name = next(iter(oracle))
    assert not torch.equal((source.read(name).values * 1.01).to(dtype), oracle[name]), "the control"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_round_trip_of_the_training_base(base: Path, double: bool, dtype: DType) -> None:
    """``--merge-base trained`` folds onto what the GPU trained on, though it never sees one.

    With double quantization the mean of all scales is summed in another order on a GPU, so that its last bit, and
    with it the last bits of every weight, may differ; a scale that lies on the border of two 8-bit codes, too.
    """
    oracle = by_cuda(quantized(base, "nf4", double, torch_dtype(dtype)))
    modules = [name.removesuffix(".weight") for name in oracle]
    source = FakeQuantized(Dequantized(Checkpoint(base)), Quantization(modules, 64, double, dtype, on_gpu=True))
    for name, expected in oracle.items():
        got = source.read(name).values.to(expected.dtype)
        if double:
            near = torch.isclose(got, expected, rtol=1e-5 if dtype == "F32" else 1e-2, atol=1e-7)
            assert near.float().mean() > 0.999, name
        else:
            assert torch.equal(got, expected), name
    plain = Dequantized(Checkpoint(base))
    assert not torch.equal(plain.read(name).values.to(expected.dtype), expected), "the control"


def every_ratio(dtype: torch.dtype, bits: int) -> Iterator[torch.Tensor]:
    """(n, 64) blocks: every mantissa as absmax, and under it every value of twelve binades and both signs, and zero."""
    top = 1 << bits
    largest = torch.arange(top, 2 * top).double() / top
    some = torch.cat([largest * 2.0**-binade for binade in range(12)])
    some = torch.cat([some, -some, torch.zeros(-2 * len(some) % 63)]).view(-1, 63)
    for part in largest.split(128):
        under = torch.where(some.abs() <= part[:, None, None], some, 0.0)
        yield torch.cat([part[:, None, None].expand(-1, len(some), 1), under], 2).to(dtype).reshape(-1, 64)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_codes_of_every_ratio(dtype: torch.dtype, bits: int) -> None:
    """A code depends on a value and its block's absmax alone: all pairs of a type, up to the exponent."""
    from bitsandbytes.functional import quantize_4bit

    for blocks in every_ratio(dtype, bits):
        theirs, _ = quantize_4bit(blocks.cuda(), blocksize=64, quant_type="nf4", compress_statistics=False)
        codes, _ = cuda_quantize.nf4(blocks, 64)
        assert torch.equal(nibbles(theirs.flatten().cpu()), codes.int())
        assert not torch.equal(codes.roll(1), codes), "the control"


def test_codes_of_scales() -> None:
    from bitsandbytes.functional import quantize_blockwise

    torch.manual_seed(0)
    scales = (torch.randn(1 << 20, 64) * 0.02).bfloat16().float().abs().amax(1)
    scales -= scales.mean()
    theirs, state = quantize_blockwise(scales.cuda(), blocksize=256)
    codes, absmax = cuda_quantize.eight_bit(scales, 256)
    assert torch.equal(absmax, state.absmax.cpu())
    assert torch.equal(codes, theirs.cpu())
    assert not torch.equal(quantize_blockwise(scales, blocksize=256)[0], codes), "the control: the CPU's"
