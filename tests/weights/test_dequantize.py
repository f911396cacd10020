"""Our dequantizers against bitsandbytes' own, to the last bit, and the round trip against a real quantized model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora2serve.errors import CheckpointError
from lora2serve.weights.bnb.fake_quantized import FakeQuantized, Quantization
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized
from lora2serve.weights.tensors import DType
from tests.support.drawn import examples
from tests.support.folding import export_merged, stored, worst_ulp
from tests.support.tiny import load_model, make_adapter, make_model, merged_by_peft

FOUR_BIT = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


def quantized(base: Path, out: Path, **config: Any) -> tuple[Path, Any]:
    """The model as bitsandbytes quantized it: its directory, and the model itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**config)
    )
    model.save_pretrained(out)
    return out, model


def dequantized_four_bit(weight: Any) -> torch.Tensor:
    """By bitsandbytes' kernel, or its generic code where rows are no multiple of the block.

    There the CPU kernel of 0.50 starts counting blocks anew in each row, unlike its quantizer and its CUDA kernels.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    state = weight.quant_state
    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(weight.data, state)
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    eager = _dequantize_4bit_compute.__wrapped__  # the compiler takes a quarter of a minute
    return eager(weight.data.reshape(-1), absmax.float(), state.code, state.blocksize, state.shape, state.dtype)


def by_bitsandbytes(model: Any) -> dict[str, torch.Tensor]:
    """Every quantized weight, dequantized by bitsandbytes itself."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import int8_vectorwise_dequant

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = dequantized_four_bit(module.weight)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[f"{name}.weight"] = int8_vectorwise_dequant(module.weight.CB.data, module.weight.SCB)
    return found


@pytest.fixture(scope="module", params=[64, 96])  # 96 is no multiple of 64: blocks run over the ends of rows
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    width: int = request.param
    return make_model(
        tmp_path_factory.mktemp("base") / "base",
        "llama",
        hidden_size=width,
        intermediate_size=width + 64,
        num_hidden_layers=1,
    )


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_four_bit_is_bit_equal(base: Path, tmp_path: Path, kind: str, double: bool) -> None:
    path, model = quantized(
        base,
        tmp_path / "q",
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    source, oracle = Dequantized(Checkpoint(path)), by_bitsandbytes(model)
    assert len(oracle) == 7
    specs = {spec.name: spec for spec in source.specs()}
    assert not [name for name in specs if "quant" in name or "absmax" in name]
    for name, expected in oracle.items():
        assert torch.equal(source.read(name).values, expected.float()), name
        rows = slice(3, specs[name].rows - 5)
        assert torch.equal(source.read(name, rows).values, expected[rows].float()), "any block of rows"


def test_int8_is_bit_equal(base: Path, tmp_path: Path) -> None:
    path, model = quantized(base, tmp_path / "q", load_in_8bit=True)
    source, oracle = Dequantized(Checkpoint(path)), by_bitsandbytes(model)
    assert oracle
    for name, expected in oracle.items():
        assert torch.equal(source.read(name).values, expected.float()), name


@pytest.mark.parametrize("double", [True, False])
def test_round_trip_is_bit_equal(base: Path, tmp_path: Path, double: bool) -> None:
    _, model = quantized(
        base,
        tmp_path / "q",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    oracle = by_bitsandbytes(model)
    modules = [name.removesuffix(".weight") for name in oracle]
    source = FakeQuantized(Dequantized(Checkpoint(base)), Quantization(modules, 64, double, "F32", on_gpu=False))
    plain = stored(base)
    for spec in source.specs():
        expected = oracle.get(spec.name, plain[spec.name]).float()
        assert torch.equal(source.read(spec.name).values.float(), expected), spec.name
        assert torch.equal(source.read(spec.name, slice(1, 7)).values.float(), expected[1:7]), "any block of rows"
    assert not torch.equal(oracle[f"{modules[0]}.weight"], plain[f"{modules[0]}.weight"].float()), (
        "the control: it is lossy"
    )


@pytest.mark.parametrize("on_gpu", [False, True])
def test_round_trip_of_a_base_that_was_loaded_in_another_type(tmp_path: Path, on_gpu: bool) -> None:
    """A float16 base is bfloat16 on a GPU before it is quantized: rounded twice."""
    stored_half = make_model(tmp_path / "half", dtype=torch.float16)
    as_loaded = load_model(stored_half, torch.bfloat16)
    as_loaded.save_pretrained(tmp_path / "loaded")
    name = "model.layers.0.self_attn.q_proj"

    def read(path: Path, dtype: DType) -> torch.Tensor:
        how = Quantization([name], 64, True, dtype, on_gpu)
        return FakeQuantized(Dequantized(Checkpoint(path)), how).read(f"{name}.weight").values

    assert torch.equal(read(stored_half, "BF16"), read(tmp_path / "loaded", "BF16"))
    assert not torch.equal(read(stored_half, "F16"), read(tmp_path / "loaded", "BF16")), "the control"


def test_round_trip_of_another_base(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.such\.weight: quantized in training, but not in this base"):
        FakeQuantized(Dequantized(Checkpoint(base)), Quantization(["no.such"], 64, True, "F32", on_gpu=False))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_only_nf4_is_computed_again(kind: str) -> None:
    """Earlier releases trained fp4, too."""
    quantization = {"type": kind, "modules": ["a"], "block_size": 64, "double_quant": True, "compute_dtype": "bfloat16"}
    record = {"quantization": quantization, "device": "cuda"}
    if kind == "nf4":
        assert Quantization.of(record) == Quantization(["a"], 64, True, "BF16", on_gpu=True)
        return
    with pytest.raises(CheckpointError, match="quantized to fp4 in training, expected nf4") as caught:
        Quantization.of(record)
    assert "--merge-base original" in caught.value.hint


def test_merge_onto_a_four_bit_checkpoint(base: Path, tmp_path: Path) -> None:
    path, model = quantized(
        base,
        tmp_path / "q",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = load_model(base)
    plain.load_state_dict({**plain.state_dict(), **by_bitsandbytes(model)})
    plain.save_pretrained(tmp_path / "plain")
    adapter = make_adapter(tmp_path / "adapter", base)
    out = export_merged(path, [adapter], tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    oracle = merged_by_peft(tmp_path / "plain", adapter)
    got = stored(out)
    assert max(worst_ulp(got, oracle).values()) <= 1


@settings(max_examples=examples(25))
@given(
    rows=st.integers(1, 300), columns=st.integers(1, 300), block=st.sampled_from([(128, 128), (64, 32)]), data=st.data()
)
def test_fp8_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, block: tuple[int, int], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
    save_file({"w.weight": weight, "w.weight_scale_inv": scales}, path / "model.safetensors")
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    (path / "config.json").write_text(json.dumps(config))
    expected = weight.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            expected[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scales[i, j]
    source = Dequantized(Checkpoint(path))
    start = data.draw(st.integers(0, rows - 1))
    assert [spec.name for spec in source.specs()] == ["w.weight"]
    assert torch.equal(source.read("w.weight", slice(start, rows)).values, expected[start:])


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    """The experts of gpt-oss: blocks and scales as one plain weight; the control swaps the nibbles."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 8, 4), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = Dequantized(Checkpoint(tmp_path))
    assert [(s.name, s.shape, s.dtype) for s in source.specs()] == [(name, (3, 128, 8), "BF16")]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(source.read(name, slice(1, 3)).values, expected[1:])
    swapped = (blocks >> 4) | (blocks << 4)
    assert not torch.equal(source.read(name).values, convert_moe_packed_tensors(swapped, scales, dtype=torch.float32))


def test_unknown_quantization_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    save_file(load_file(base / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantized by 'awq'"):
        Dequantized(Checkpoint(tmp_path))
