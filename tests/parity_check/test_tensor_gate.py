"""The tensor gate: every byte of a sound export is the planned one, and one that is not names its tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, ReaderTensor
from safetensors.torch import load_file, save_file

from lora2serve.api.export_model import export
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.parity_report import Gate
from lora2serve.parity_check import tensor_verdict, thresholds
from lora2serve.parity_check.tensor_gate import TensorComparator
from lora2serve.progress import Silent
from lora2serve.weights import tensors as weights
from tests.converters.test_gguf_families import FAMILIES, model_of
from tests.support.manifests import change_manifest
from tests.support.runs import make_chat_model
from tests.support.tiny import make_adapter, make_imatrix

pytestmark = pytest.mark.engine

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMATS = {"vllm": ("vllm", None), "w4a16": ("vllm", "w4a16"), "nvfp4": ("vllm", "nvfp4"), "fp8": ("vllm", "fp8"),
           "Q8_0": ("gguf", "Q8_0"), "Q4_K_M": ("gguf", "Q4_K_M"), "Q2_K": ("gguf", "Q2_K")}  # fmt: skip
Weights = dict[str, torch.Tensor]
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters whose change is a fiftieth of each weight, in Frobenius norms, as after a QLoRA."""
    folder = tmp_path_factory.mktemp("tensors")
    base = make_chat_model(folder / "base", hidden_size=256, intermediate_size=512, head_dim=64, pad_token_id=1)
    strong = load_file(make_adapter(folder / "as-trained", base, target_modules=MODULES) / "adapter_model.safetensors")
    for name, change in ADAPTERS.items():
        if name != "as-trained":
            shutil.copytree(folder / "as-trained", folder / name)
        changed = change(fiftieth(strong, load_file(base / "model.safetensors")))
        save_file(changed, folder / name / "adapter_model.safetensors", {"format": "pt"})
    return folder


def fiftieth(adapter: Weights, base: Weights) -> Weights:
    scaled = dict(adapter)
    for name in (name for name in adapter if "lora_B" in name):
        weight = base[name.removeprefix("base_model.model.").replace(".lora_B", "")].float()
        change = 4 * adapter[name] @ adapter[name.replace("lora_B", "lora_A")]  # alpha 16, rank 4
        scaled[name] = adapter[name] * (0.02 * weight.norm() / change.norm())
    return scaled


def times(factor: float, where: str = "lora_B") -> Callable[[Weights], Weights]:
    return lambda adapter: {k: v * factor if "lora_B" in k and where in k else v for k, v in adapter.items()}


def heads_permuted(adapter: Weights) -> Weights:
    def turn(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.view(4, 64, -1).flip(0).reshape(value.shape) if "q_proj.lora_B" in name else value

    return {name: turn(name, value) for name, value in adapter.items()}


ADAPTERS: dict[str, Callable[[Weights], Weights]] = {
    "as-trained": lambda adapter: adapter,
    "tenth": times(0.1),
    "alpha-1.1": times(1.1),
    "tenth-alpha-1.1": times(0.11),
    "tenth-module-lost": lambda adapter: times(0.0, "layers.1.mlp.down_proj")(times(0.1)(adapter)),
    "tenth-heads-permuted": lambda adapter: heads_permuted(times(0.1)(adapter)),
    "half": times(0.5),
    "v-lost": times(0.0, "v_proj"),
    "none": times(1e-4),
}


def made(root: Path, adapter: str, **options: Any) -> dict[str, Path]:
    """Every format of ``FORMATS``, made once."""
    out = root / "exports" / adapter
    if not out.exists():
        quants = [quant for _, quant in FORMATS.values() if quant]
        source = {"source": root / adapter, "base": root / "base", "progress": Silent()} | options
        export(**source, targets=["vllm", "gguf"], quants=quants, out=out)
        export(**source, targets="vllm", out=out)
    return {name: out / (f"{target}-{quant}" if quant else target) for name, (target, quant) in FORMATS.items()}


def verdict(root: Path, path: Path, adapter: str = "as-trained", base: str = "base") -> Gate:
    adapters = [str(root / adapter)] if adapter else []
    gate = TensorComparator({"base": str(root / base), "adapters": adapters, "run": None})
    found = gate.compare(path, lambda _: None)
    assert found is not None
    return tensor_verdict.tensors(found, thresholds.lookup(thresholds.kind_of(Manifest.read(path))))


@pytest.mark.parametrize("name", FORMATS)
def test_sound(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks that the rows come in."""
    path = made(root, "as-trained")[name]
    for block in (weights.BLOCK, 5 * 256):
        monkeypatch.setattr(weights, "BLOCK", block)
        gate = verdict(root, path)
        assert gate.status == "met", gate
        assert {check.name: check.value for check in gate.checks}["equal_tensors"] == 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", ["tenth-alpha-1.1", "tenth-module-lost", "tenth-heads-permuted"])
def test_an_adapter_at_a_tenth(root: Path, damage: str, name: str) -> None:
    """Of what a QLoRA changes: red down to the coarsest types."""
    gate = verdict(root, made(root, damage)[name], "tenth")
    assert gate.status == "missed"
    expected = {"tenth-module-lost": "down", "tenth-heads-permuted": "q"}.get(damage, "")
    assert expected in gate.first.split(":")[0]


def zero_a_row(w: Weights) -> None:
    w["model.embed_tokens.weight"][1500] = 0


def one_nan(w: Weights) -> None:
    w[f"{LAYER}self_attn.o_proj.weight"][3, 5] = torch.nan


def one_step(w: Weights) -> None:
    bits = w[f"{LAYER}mlp.up_proj.weight"].view(torch.int16)
    bits[511, 255] += 1


def noisy_norms(w: Weights) -> None:
    for name in (name for name in w if "norm" in name):
        w[name] = (w[name].float() * (1 + 0.1 * torch.randn(w[name].shape))).to(w[name].dtype)


def swap_layers(w: Weights) -> None:
    one, two = (f"model.layers.{number}.mlp.down_proj." for number in (0, 1))
    for name in [name for name in w if name.startswith(one)]:
        other = name.replace(one, two)
        w[name], w[other] = w[other].clone(), w[name].clone()


def other_type(w: Weights) -> None:
    w["model.norm.weight"] = w["model.norm.weight"].half()


def other_shape(w: Weights) -> None:
    w[f"{LAYER}mlp.down_proj.weight"] = w[f"{LAYER}mlp.down_proj.weight"].reshape(512, 256)


def transposed(w: Weights) -> None:
    w[f"{LAYER}self_attn.q_proj.weight"] = w[f"{LAYER}self_attn.q_proj.weight"].T


def one_more(w: Weights) -> None:
    w[f"{LAYER}self_attn.q_proj.bias"] = torch.zeros(256, dtype=torch.bfloat16)


def one_less(w: Weights) -> None:
    del w[f"{LAYER}input_layernorm.weight"]


def one_scale(w: Weights) -> None:
    w[f"{LAYER}mlp.up_proj.weight_scale"][7, 0] *= 1.02


def one_code(w: Weights) -> None:
    w[f"{LAYER}mlp.up_proj.weight_packed"].view(torch.uint8)[-1, -1] ^= 1


def global_scale(w: Weights) -> None:
    w[f"{LAYER}mlp.up_proj.weight_global_scale"] *= 2


def group_of_zeros(w: Weights) -> None:
    w[f"{LAYER}self_attn.v_proj.weight_scale"][:, 0] = 0


def shape_on_record(w: Weights) -> None:
    w[f"{LAYER}mlp.up_proj.weight_shape"] = torch.tensor([256, 512])


IN_SAFETENSORS = [
    ("vllm", zero_a_row, "model.embed_tokens.weight", "of 786432 bytes are not the planned ones, from row 1500"),
    ("vllm", one_nan, f"{LAYER}self_attn.o_proj.weight", "NaN"),
    ("vllm", one_step, f"{LAYER}mlp.up_proj.weight", "1 of 262144 bytes"),
    ("vllm", noisy_norms, "norm.weight", ""),
    ("vllm", swap_layers, "mlp.down_proj.weight", "one part is damaged"),
    ("vllm", other_type, "model.norm.weight", "stored as F16 [256], planned as BF16 [256]"),
    ("vllm", other_shape, f"{LAYER}mlp.down_proj.weight", "stored as BF16 [512, 256]"),
    ("vllm", transposed, f"{LAYER}self_attn.q_proj.weight", "one part is damaged, transposed"),
    ("vllm", one_more, f"{LAYER}self_attn.q_proj.bias", "not planned"),
    ("vllm", one_less, f"{LAYER}input_layernorm.weight", "missing"),
    ("w4a16", one_scale, f"{LAYER}mlp.up_proj.weight_scale", "from row 7"),
    ("w4a16", one_code, f"{LAYER}mlp.up_proj.weight_packed", "1 of 65536 bytes"),
    ("w4a16", noisy_norms, "norm.weight", ""),
    ("w4a16", swap_layers, "mlp.down_proj.weight", ""),
    ("w4a16", group_of_zeros, f"{LAYER}self_attn.v_proj.weight_scale", ""),
    ("w4a16", shape_on_record, f"{LAYER}mlp.up_proj.weight_shape", ""),
    ("fp8", noisy_norms, "norm.weight", ""),
    ("nvfp4", global_scale, f"{LAYER}mlp.up_proj.weight_global_scale", ""),
    ("nvfp4", one_code, f"{LAYER}mlp.up_proj.weight_packed", ""),
]


@pytest.mark.parametrize(("name", "damage", "first", "words"), IN_SAFETENSORS)
def test_damage_in_safetensors(
    root: Path, tmp_path: Path, name: str, damage: Callable[[Weights], None], first: str, words: str
) -> None:
    path = shutil.copytree(made(root, "as-trained")[name], tmp_path / "damaged")
    content = load_file(path / "model.safetensors")
    damage(content)
    save_file({key: value.contiguous() for key, value in content.items()}, path / "model.safetensors", {"format": "pt"})
    gate = verdict(root, path)
    assert gate.status == "missed"
    assert first in gate.first
    assert words in f"{gate.first}; {gate.cause}"


def zero_row(data: np.ndarray) -> None:
    data[5] = 0


def one_bit(data: np.ndarray) -> None:
    data[-1, -1] ^= 1


def noise(data: np.ndarray) -> None:
    data *= 1 + 0.1 * np.random.default_rng(0).standard_normal(data.shape).astype(np.float32)


def garbage(data: np.ndarray) -> None:
    data[-8:] = np.random.default_rng(0).integers(0, 256, data[-8:].shape)


def two_rows(data: np.ndarray) -> None:
    data[[3, 4]] = data[[4, 3]]


IN_GGUF = [
    (kind, tensor, damage)
    for kind in ("Q8_0", "Q4_K_M", "Q2_K")
    for tensor, damage in (
        ("token_embd.weight", zero_row), ("blk.1.ffn_up.weight", one_bit), ("blk.0.attn_norm.weight", noise),
        ("output.weight", garbage), ("blk.1.attn_q.weight", two_rows),
    )
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tensor", "damage"), IN_GGUF)
def test_damage_in_gguf(
    root: Path, tmp_path: Path, kind: str, tensor: str, damage: Callable[[np.ndarray], None]
) -> None:
    path = shutil.copytree(made(root, "as-trained")[kind], tmp_path / "damaged")
    stored = tensor_of(path, tensor)
    damage(stored.data)
    stored.data.flush()
    gate = verdict(root, path)
    assert gate.status == "missed"
    assert gate.first.startswith(f"{tensor}: ")


def tensor_of(path: Path, name: str) -> ReaderTensor:
    (file,) = path.glob("*.gguf")
    return next(tensor for tensor in GGUFReader(file, "r+").tensors if tensor.name == name)


def test_the_label_is_the_type(root: Path, tmp_path: Path) -> None:
    """Finer than stored, and coarser."""
    for kind, label, cause in (("Q4_K_M", "Q5_K_M", "more coarsely"), ("Q4_K_M", "Q2_K", "types")):
        path = shutil.copytree(made(root, "as-trained")[kind], tmp_path / label)
        change_manifest(path, quant=label)
        gate = verdict(root, path)
        assert gate.status == "missed"
        assert "stored as Q4_K" in gate.first and "planned as" in gate.first
        assert cause in gate.cause


def by_others(path: Path, to: Path) -> Path:
    """Without the record of its options, as an earlier version or another tool left it: it is kept to bounds."""
    shutil.copytree(path, to)
    change_manifest(to, options=None)
    return to


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("adapter", "strength"), [("alpha-1.1", 1.1), ("half", 0.5), ("none", 0.0), ("v-lost", 0.0)])
def test_the_strength_where_bytes_say_nothing(
    root: Path, tmp_path: Path, name: str, adapter: str, strength: float
) -> None:
    """At every bit width; what is damaged is told from what is too weak."""
    gate = verdict(root, by_others(made(root, adapter)[name], tmp_path / "other"))
    assert gate.status == "missed"
    if FORMATS[name][1]:
        where, _, measured = gate.first.partition(": ")
        assert float(measured.split()[0]) == pytest.approx(strength, abs=0.1)
        assert ("v_proj" in where or "attn_v" in where) == (adapter == "v-lost")


# one that cannot be without a matrix, and two that can; the quantizer takes seconds a tensor for the others
RARE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("IQ1_S", "IQ3_S")]


@pytest.fixture(scope="module", params=[*RARE, "IQ2_XXS", "Q2_K", "Q4_K_M"])
def fitted(root: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """An export with an importance matrix, and the matrix."""
    matrix = make_imatrix(root / f"{request.param}.gguf", root / "base", 0)
    source = {"source": root / "as-trained", "base": root / "base", "progress": Silent()}
    (done,) = export(
        **source, targets="gguf", quants=request.param, imatrix=matrix, out=root / f"fitted-{request.param}"
    )
    yield done.path, matrix


def test_an_importance_matrix(root: Path, tmp_path: Path, fitted: tuple[Path, Path]) -> None:
    """With it every byte is compared; without it the type's own error bounds what is stored."""
    path, matrix = fitted
    gate = verdict(root, path)
    assert gate.status == "met" and not gate.cause
    hidden = matrix.rename(tmp_path / "hidden")
    try:
        gate = verdict(root, path)
        assert gate.status == "met", gate
        assert "the importance matrix is no longer there" in gate.cause
        for number, (tensor, damage) in enumerate(
            (("blk.0.attn_norm.weight", noise), ("blk.1.attn_q.weight", zero_row), ("blk.1.ffn_up.weight", two_rows))
        ):
            damaged = shutil.copytree(path, tmp_path / f"damaged-{number}")
            stored = tensor_of(damaged, tensor)
            damage(stored.data)
            stored.data.flush()
            gate = verdict(root, damaged)
            assert gate.status == "missed" and tensor in gate.first, (tensor, gate)
        assert verdict(root, path, "half").status == "missed", "an adapter twice as strong as planned"
    finally:
        hidden.rename(matrix)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe", "gemma3", "phi3", "gpt-oss", "llama-tied"])
def test_sound_families(tmp_path: Path, family: str, seed: int) -> None:
    """Tied heads, biases, fused and stacked weights, norms that are shifted."""
    base = model_of({"root": tmp_path}, family)
    modules = ["qkv_proj", "down_proj"] if family == "phi3" else ["q_proj", "v_proj", "o_proj"]
    make_adapter(tmp_path / "adapter", base, seed=seed, std=0.01, target_modules=modules)
    fused = "moe" in family or FAMILIES[family][0] == "gpt_oss"
    quants = ["Q8_0", "Q4_K_M", "F16", *([] if fused else ["w4a16"])]
    source = {"source": tmp_path / "adapter", "base": base, "progress": Silent()}
    done = export(**source, targets=["gguf"] if fused else ["vllm", "gguf"], quants=quants, out=tmp_path / "out")
    for each in done:
        gate = verdict(tmp_path, each.path, "adapter", base.name)
        assert gate.status == "met", (each.path, gate)
    without = replace(verdict(tmp_path, done[0].path, "", base.name), checks=())
    assert without.status == "missed", "the control: the base alone"
