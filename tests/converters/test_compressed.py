"""Quantized vLLM directories: the library's own bytes, its own loader, real vLLM, and damage that must be seen."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.vllm.compressed.compressed_reader import CompressedReader
from converters.vllm.compressed.quantize import global_factor, quantize
from converters.vllm.compressed.schemes import SCHEMES
from converters.vllm.compressed.selection import FUSED, select
from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel, find
from lora2serve.exporting.stream import Plan, export
from lora2serve.parity_check import tensor_gate, thresholds
from lora2serve.parity_check.tensor_difference import TensorDifference
from lora2serve.progress import Silent
from lora2serve.weights import tensors
from scripts.vllm_lora_classes import models_dir
from tests.support.folding import fold, stored
from tests.support.tiny import make_adapter, make_model

PRESETS = {
    "fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "int8": "W8A8", "w8a16": "W8A16", "w4a16": "W4A16",
    "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16",
}  # fmt: skip
SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_key_value_heads": 2, "head_dim": 64}


def written(base: Path, out: Path, *quants: str, adapters: tuple[Path, ...] = ()) -> dict[str, Path]:
    """All of them in one pass over ``base``."""
    merged, exporter = fold(base, adapters), find("vllm")
    model = ExportModel(merged, {}, "tiny", str(base))
    plans = [Plan("vllm", exporter, exporter.Options(quant=quant), out / quant) for quant in quants]
    exports = export(model, plans, Silent())
    return {quant: done.path for quant, done in zip(quants, exports, strict=True)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base: nothing is rounded before the library sees it. Its k_proj are four times as large as the rest."""
    path = make_model(tmp_path_factory.mktemp("base") / "plain", dtype=torch.float32, **SHAPE)
    content = load_file(path / "model.safetensors")
    save_file(
        {k: v * 4 if "k_proj" in k else v for k, v in content.items()}, path / "model.safetensors", {"format": "pt"}
    )
    return path


@pytest.fixture(scope="module")
def made(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written(plain, tmp_path_factory.mktemp("made"), *SCHEMES)


@pytest.fixture(scope="module")
def whole() -> Iterator[Any]:
    """compressed-tensors imported as everybody does, with its compiled function as plain Python."""
    import compressed_tensors
    import torch._dynamo

    with torch._dynamo.config.patch(disable=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield compressed_tensors


def by_the_library(weights: dict[str, torch.Tensor], quant: str) -> dict[str, torch.Tensor]:
    """One fused group, each weight in a Linear of its own, initialized and compressed by the library."""
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import initialize_module_for_quantization, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    found = {}
    low, high = (torch.stack([f(w) for w in weights.values()]) for f in (torch.min, torch.max))
    for name, weight in weights.items():
        scheme = preset_name_to_scheme(PRESETS[quant], ["Linear"])
        module = torch.nn.Linear(*reversed(weight.shape), bias=False)
        module.weight.data.copy_(weight)
        initialize_module_for_quantization(module, scheme)
        factor = generate_gparam(low.min(), high.max()) if hasattr(module, "weight_global_scale") else None
        if factor is not None:
            module.weight_global_scale.data.copy_(factor)
        args, (out, into) = scheme.weights, weight.shape
        shape = {"channel": (out, 1, 1, into), "block": (out // 128, 128, into // 128, 128)}.get(
            args.strategy, (out, 1, into // (args.group_size or 1), args.group_size or 1)
        )
        tiles = weight.view(shape)
        scale, _ = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), args, global_scale=factor)
        assert module.weight_scale.shape == scale.shape, "the shape that the library itself expects"
        module.weight_scale.data.copy_(scale)
        compress_module(module)
        assert module.quantization_scheme.format.value == SCHEMES[quant].format, "the format that it chooses itself"
        found |= {f"{name.removesuffix('weight')}{key}": value.data for key, value in module.state_dict().items()}
    return found


@pytest.mark.parametrize("quant", SCHEMES)
def test_the_bytes_are_the_librarys(quant: str, plain: Path, made: dict[str, Path], whole: Any) -> None:
    """Names, types, shapes and every byte, where rows came in blocks and the library had whole weights."""
    ours, source = stored(made[quant]), stored(plain)
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        names = [f"model.layers.1.{part}.weight" for part in parts]
        expected = by_the_library({name: source[name] for name in names}, quant)
        assert {name for name in ours if any(f"layers.1.{part}." in name for part in parts)} == expected.keys()
        for name, value in expected.items():
            assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
            assert torch.equal(ours[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("quant", SCHEMES)
def test_the_config_is_the_librarys(quant: str, made: dict[str, Path], whole: Any) -> None:
    """What it writes for the same model with the same layers quantized; transformers reads it."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoConfig, AutoModelForCausalLM

    said = json.loads((made[quant] / "config.json").read_text())["quantization_config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made[quant]))
    scheme = whole.quantization.preset_name_to_scheme(PRESETS[quant], ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    theirs = QuantizationConfig.from_pretrained(model, SCHEMES[quant].format).model_dump(mode="json")
    theirs["config_groups"]["group_0"]["format"] = SCHEMES[quant].format
    assert said["config_groups"] == theirs["config_groups"]
    assert said["ignore"] == theirs["ignore"] == ["lm_head"]
    assert (said["format"], said["quant_method"]) == (SCHEMES[quant].format, "compressed-tensors")
    assert said["quantization_status"] == "compressed"
    assert said["version"] == whole.__version__


@pytest.mark.engine
@pytest.mark.parametrize("quant", SCHEMES)
def test_vllm_reads_the_config(quant: str, made: dict[str, Path]) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    said = json.loads((made[quant] / "config.json").read_text())["quantization_config"]
    assert CompressedTensorsConfig.from_config(said).quant_format == SCHEMES[quant].format


def test_towers_stay() -> None:
    """Of a multimodal model the text part is quantized; the rest is named in ``ignore``."""
    text, tower = "model.language_model.layers.0.", "model.visual.blocks.0."
    names = {
        f"{text}self_attn.q_proj", f"{text}mlp.experts.0.up_proj", f"{text}linear_attn.in_proj_qkv",
        f"{text}mlp.gate", f"{text}mlp.shared_expert_gate", f"{text}linear_attn.in_proj_a", "lm_head",
        f"{tower}attn.qkv", f"{tower}mlp.fc1", "model.visual.merger.linear_fc1", "multi_modal_projector.linear_1",
        "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj", "audio_tower.layers.0.fc1",
    }  # fmt: skip
    specs = [tensors.TensorSpec(f"{name}.weight", (64, 64), "BF16") for name in sorted(names)]
    found = select(specs, {"text_config": {"model_type": "qwen3_5_moe"}}, SCHEMES["fp8"])
    quantized = {name.removesuffix(".weight") for name in found.weights}
    assert quantized == {name for name in names if name.startswith(text) and name.endswith(("_proj", "_qkv"))}
    assert set(found.ignore) == names - quantized
    stack = tensors.TensorSpec(f"{text}mlp.experts.gate_up_proj", (4, 128, 64), "BF16")
    with pytest.raises(ExportError, match="experts in one tensor"):
        select([*specs, stack], {}, SCHEMES["fp8"])


def test_other_weights_stay(plain: Path, made: dict[str, Path]) -> None:
    source, ours = stored(plain), stored(made["nvfp4"])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(source[name], ours[name])
    layer = "model.layers.0."
    for parts in FUSED[:2]:
        prefix = layer + ("self_attn." if "q_proj" in parts else "mlp.")
        assert len({float(ours[f"{prefix}{part}.weight_global_scale"]) for part in parts}) == 1
    assert "dtype: bfloat16" in (made["nvfp4"] / "serve.yaml").read_text(), "its kernels have no float32"
    apart = [float(ours[f"model.layers.{n}.mlp.down_proj.weight_global_scale"]) for n in (0, 1)]
    assert apart[0] != apart[1], "the control: what is not fused has a scale of its own"


# What vLLM 0.32.0 fuses elsewhere: encoders and speech, which stay in 16 bits, gates (likewise), and three models whose
# q, k and v are joined by more, or by less.
NOT_OURS = {
    ("query", "key", "value"), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("fc1", "fc3"),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"), ("k_proj", "v_proj"), ("in_proj_b", "in_proj_a"), ("wq", "wk", "wv"),
    ("attn.q", "attn.k", "attn.v"), ("gate_proj", "dense_h_to_4h"), ("q_proj", "k_proj"),
    ("q_proj", "k_proj", "v_proj", "b_proj"), ("q_proj", "k_proj", "v_proj", "g_proj"),
}  # fmt: skip


def test_every_fused_layer_of_vllm_is_known() -> None:
    root = models_dir()
    assert root is not None
    found = set()
    for path in root.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for literal in re.findall(r"packed_modules_mapping\b[^=]*= (\{.*?\n? *\})", text, re.S):
            with contextlib.suppress(ValueError, SyntaxError):
                found |= {tuple(parts) for parts in ast.literal_eval(literal).values() if len(parts) > 1}
    assert len(found) > 10
    assert found - NOT_OURS <= set(FUSED)
    assert set(FUSED) - {("w1", "w3")} <= found, "the control: nothing here that vLLM does not fuse"


def test_small_blocks_give_the_same_bytes(
    plain: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK", 4096)
    again = written(plain, tmp_path, *SCHEMES)
    for quant, path in again.items():
        assert (path / "model.safetensors").read_bytes() == (made[quant] / "model.safetensors").read_bytes(), quant
        assert not [file.name for file in path.iterdir() if file.name.startswith("tmp")]


def differences(base: Path, path: Path, quant: str, *adapters: Path) -> tuple[list[TensorDifference], list[str]]:
    """The tensor gate's figures."""
    merged = fold(base, adapters)
    reader = CompressedReader(path, Manifest(target="vllm", quant=quant), ExportModel(merged, {}, "tiny", str(base)))
    found = {name: TensorDifference(name) for name in reader.wanted}
    for spec, rows in tensor_gate.parts(ExportModel(merged, {}, "tiny", str(base)), reader.wanted):
        found[spec.name].add(*reader.pair(spec, rows, merged.read(spec.name, rows).values)[1:])
    return list(found.values()), list(reader.differences)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Path]]:
    """A bf16 base, an adapter, and the exports of both."""
    place = tmp_path_factory.mktemp("adapted")
    base = make_model(place / "base", **SHAPE)
    adapter = make_adapter(place / "adapter", base)
    return base, adapter, written(base, place / "out", *SCHEMES, adapters=(adapter,))


RARE = ("fp8", "int8", "w8a16")  # of each way in which values are stored, the others are one
STORED = [pytest.param(quant, marks=pytest.mark.slow if quant in RARE else ()) for quant in SCHEMES]


@pytest.mark.parametrize("quant", STORED)
def test_dequantized_it_is_the_fold(quant: str, adapted: tuple[Path, Path, dict[str, Path]]) -> None:
    """The error is that of the format, and none where nothing is quantized."""
    base, adapter, exports = adapted
    out = exports[quant]
    found, missing = differences(base, out, quant, adapter)
    bound = thresholds.lookup(quant).tensor_nmse
    assert bound and not missing
    assert max(one.nmse for one in found) < bound
    assert max(one.worst for one in found) < 10 * bound
    assert all(one.nmse == 0 for one in found if "proj" not in one.name)
    without, _ = differences(base, out, quant)
    changed = next(one for one in without if "layers.0.self_attn.v_proj" in one.name)
    assert changed.nmse > bound, "the control: without the adapter it is another model"


def damage(path: Path, to: Path, change: Any) -> Path:
    shutil.copytree(path, to)
    content = load_file(to / "model.safetensors")
    change(content)
    save_file(content, to / "model.safetensors")
    return to


LAYER = "model.layers.0.self_attn."


@pytest.mark.parametrize("quant", STORED)
def test_damage_is_seen(quant: str, plain: Path, made: dict[str, Path], tmp_path: Path) -> None:
    """Two tensors' scales swapped, a scale lost, values packed in the other order."""
    bound = thresholds.lookup(quant).tensor_nmse
    assert bound

    def swap(content: dict[str, torch.Tensor]) -> None:
        one, two = (f"{LAYER}{name}.weight_scale" for name in ("k_proj", "v_proj"))
        content[one], content[two] = content[two].clone(), content[one].clone()

    def lose(content: dict[str, torch.Tensor]) -> None:
        del content[f"{LAYER}q_proj.weight_scale"]

    def turn(content: dict[str, torch.Tensor]) -> None:
        name = f"{LAYER}q_proj.{SCHEMES[quant].weight}"
        content[name] = content[name].view(torch.uint8).flip(1).contiguous().view(content[name].dtype)

    swapped, _ = differences(plain, damage(made[quant], tmp_path / "swapped", swap), quant)
    assert max(one.nmse for one in swapped) > bound
    turned, _ = differences(plain, damage(made[quant], tmp_path / "turned", turn), quant)
    assert max(one.nmse for one in turned) > bound
    lost = damage(made[quant], tmp_path / "lost", lose)
    merged = fold(plain, ())
    reader = CompressedReader(lost, Manifest(target="vllm", quant=quant), ExportModel(merged, {}, "tiny", str(plain)))
    assert [name for name in reader.differences if "q_proj.weight" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", SCHEMES)
def test_scales_of_every_magnitude(quant: str, dtype: torch.dtype, whole: Any) -> None:
    """Rows and groups of zeros, and weights from the smallest to the largest that the formats tell apart."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(128, 1024, generator=generator)
    weight[:, ::16] = torch.tensor([1.0, 1.25, 1.5, 1.7499999, 1.75, 1.9999999, -1.75, -1.0]).repeat(8)
    weight *= 2.0 ** torch.arange(-64, 64)[:, None]
    weight[3] = 0.0
    weight[:, 256:512] = 0.0
    name, scheme = "x.weight", SCHEMES[quant]
    expected = by_the_library({name: weight.to(dtype).float()}, quant)
    factor = global_factor(float(weight.to(dtype).float().abs().max())) if scheme.shared else None
    codes, scales = quantize(weight.to(dtype), scheme, "F32", factor)
    for ours, key in ((codes, scheme.weight), (scales, "weight_scale")):
        theirs = expected[f"x.{key}"]
        assert ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), key
    other, _ = quantize(weight.to(dtype).flip(1), scheme, "F32", factor)
    assert not torch.equal(other.view(torch.uint8), codes.view(torch.uint8)), "the control"


def test_mxfp4_rounds_every_exponent_as_the_library_does(whole: Any) -> None:
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    significands = torch.tensor([1.0, 1.5, 1.75 - 2**-23, 1.75, 2 - 2**-23])
    peaks = (significands[None] * 2.0 ** torch.arange(-126, 126)[:, None].float()).flatten()
    rows = torch.zeros(len(peaks), 32)
    rows[:, 5] = -peaks
    scales, _ = calculate_qparams(-peaks, torch.zeros(()), preset_name_to_scheme("MXFP4A16", []).weights)
    theirs = compress_mx_scale(scales, torch.uint8)
    assert torch.equal(quantize(rows, SCHEMES["mxfp4"], "U8")[1].flatten(), theirs)
    assert len(theirs.unique()) > 250, "the control: they are not all one"


@pytest.mark.engine
def test_an_export_needs_neither_the_library_nor_transformers() -> None:
    """They are 260 MB and seconds; the reader, which runs in a process of its own, has them."""
    script = """if True:
        import sys, torch
        from converters.vllm import vllm_sink
        from converters.vllm.compressed.quantize import global_factor, quantize
        for scheme in vllm_sink.SCHEMES.values():
            quantize(torch.ones(128, 128), scheme, "BF16", global_factor(1.0) if scheme.shared else None)
        print([name for name in ("compressed_tensors", "transformers", "torch._dynamo") if name in sys.modules])
        vllm_sink.CompressedReader.__init__.__globals__["_library"]()
        print([name for name in ("compressed_tensors", "transformers") if name in sys.modules])
    """
    lines = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert lines[0] == "[]"
    assert lines[1] == "['compressed_tensors', 'transformers']", "the control"


def test_refusals(tmp_path: Path) -> None:
    """Before the first byte, each by the name of what does not fit."""
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("llama", {}, "fp8-block", r"k_proj.weight: 32 rows, expected a multiple of 128"),
        ("llama", {"intermediate_size": 136}, "w4a16", r"down_proj.weight: 136 columns, expected a multiple of 32"),
        ("gpt2", {"n_embd": 64, "n_layer": 1, "n_head": 4}, "fp8", r"gpt2: its weights are stored transposed"),
    ]
    for number, (kind, changes, quant, said) in enumerate(cases):
        base = make_model(tmp_path / f"base{number}", kind, **changes)
        with pytest.raises(ExportError, match=said) as error:
            written(base, tmp_path / "out", quant)
        assert error.value.hint == "export it in 16 bits, without --quant"
        assert not list((tmp_path / "out").glob("*"))
    narrow = make_model(tmp_path / "narrow")
    finer = json.loads((written(narrow, tmp_path / "out", "w4a16")["w4a16"] / "config.json").read_text())
    assert finer["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64


MOE = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts(kind: str, tmp_path: Path) -> None:
    """Each expert by itself, as vLLM loads them, with gate and up (w1 and w3) under one scale; routers stay."""
    base = make_model(tmp_path / "base", kind, num_experts_per_tok=2, num_hidden_layers=1, **MOE)
    out = written(base, tmp_path / "out", "nvfp4", "fp8")
    found = stored(out["nvfp4"])
    pair = ("w1", "w3") if kind == "mixtral" else ("gate_proj", "up_proj")
    experts = {name.rsplit(".", 2)[0] for name in found if ".experts." in name}
    assert len(experts) == 4
    for expert in experts:
        assert len({float(found[f"{expert}.{part}.weight_global_scale"]) for part in pair}) == 1
    config = json.loads((out["fp8"] / "config.json").read_text())["quantization_config"]
    routers = [name for name in config["ignore"] if name.endswith("gate")]
    assert routers and all(found[f"{name}.weight"].dtype == torch.bfloat16 for name in routers)
    assert not differences(base, out["fp8"], "fp8")[1]


@pytest.mark.parametrize(
    "quant",
    [
        "w4a16",
        "nvfp4",
        *(pytest.param(quant, marks=pytest.mark.engine) for quant in ("fp8-block", "mxfp4")),
        *(pytest.param(quant, marks=pytest.mark.slow) for quant in RARE),
    ],
)
def test_transformers_loads_it(quant: str, plain: Path, made: dict[str, Path]) -> None:
    """``from_pretrained``, as parity does it; the activations' share of the error is in, if the scheme has one."""
    from lora2serve.parity_check.engines.transformers_engine import _decompressed
    from tests.support.tiny import load_model

    given = {"dtype": torch.float32, **_decompressed(str(made[quant]))}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made[quant], **given).float()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        ours, theirs = (m(ids).logits.double() for m in (model, load_model(plain)))
    share = float((ours - theirs).square().sum() / theirs.square().sum())
    assert 0 < share < 4 * (thresholds.lookup(quant).tensor_nmse or 0), share
