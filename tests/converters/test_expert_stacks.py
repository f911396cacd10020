"""Experts of one 3-D tensor, quantized one by one: the library's bytes, PEFT's fold, and where vLLM's loader puts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.vllm.compressed.schemes import SCHEMES
from lora2serve.errors import ExportError
from tests.converters.test_compressed import by_the_library, differences, whole, written
from tests.merge.test_binding import make_multimodal
from tests.support import vllm_weights
from tests.support.folding import stored
from tests.support.tiny import make_adapter, make_model, model_state

__all__ = ["whole"]  # a fixture

WEIGHTS = "model.safetensors"
FEW = ("fp8", "nvfp4")  # a scale for itself, and one that gate and up share
# Whole blocks of 128 by 128, two of them each way, for fp8-block. Every matrix of an expert is square.
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_experts_per_tok": 1,
    "num_hidden_layers": 1, "num_local_experts": 2, "num_experts": 2, "num_key_value_heads": 4, "head_dim": 64,
    "shared_expert_intermediate_size": 256, "shared_intermediate_size": 256,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_expand": 2, "mamba_d_state": 16, "mamba_n_groups": 1}
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256, "in_channels": 3,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {  # model_type -> what its config needs beside
    "llama4_text": {"intermediate_size_mlp": 256, "interleave_moe_layer_step": 1},
    "qwen3_5_moe_text": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "layer_types": ["full_attention"],
    },
    "qwen3_vl_moe": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoehybrid": {**MAMBA, "layer_types": ["attention"]},
}  # fmt: skip


def make(path: Path, kind: str, *, hub: bool = False, **changes: Any) -> Path:
    """In float32: nothing is rounded before the library sees it. ``hub``: as Qwen's own files have it."""
    changes = {**SHAPE, **KINDS[kind], **changes}
    if kind != "qwen3_vl_moe":
        make_model(path, kind, dtype=torch.float32, **changes)
        if kind == "qwen3_5_moe_text":  # as published: saved by transformers, they are taken apart
            state = {name: tensor.clone() for name, tensor in model_state(path).items()}
            save_file(state, path / WEIGHTS, {"format": "pt"})
        return path
    make_multimodal(path, kind, changes, vision_config=VISION)
    weights = {name: tensor.float() for name, tensor in stored(path).items()}
    if hub:
        weights |= {name: t.mT.contiguous() for name, t in weights.items() if ".experts." in name}
    save_file(weights, path / WEIGHTS, {"format": "pt"})
    return path


def experts_of(base: Path) -> tuple[str, Any]:
    """The module of the first layer's experts, as transformers has them in memory: its name, and itself."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base)
    loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = loader.from_pretrained(base, dtype=torch.float32)
    return next((name, module) for name, module in model.named_modules() if hasattr(module, "gate_up_proj"))


def by_transformers(experts: Any, number: int) -> dict[str, torch.Tensor]:
    """One expert's matrices, (out, in)."""
    transposed = getattr(experts, "is_transposed", type(experts).__name__.startswith("Llama4"))
    gate_up, down = (getattr(experts, name).data[number] for name in ("gate_up_proj", "down_proj"))
    gate_up, down = (gate_up.T, down.T) if transposed else (gate_up, down)
    gate, up = gate_up.chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


@pytest.mark.parametrize(
    ("kind", "quants"),
    [
        ("llama4_text", (*FEW, "fp8-block")),
        pytest.param("llama4_text", tuple(SCHEMES), marks=pytest.mark.slow),
        ("granitemoe", FEW),
        *(pytest.param(kind, FEW, marks=pytest.mark.engine) for kind in ("qwen3_5_moe_text", "qwen3_vl_moe")),
    ],
)
def test_the_bytes_are_the_librarys(kind: str, quants: tuple[str, ...], tmp_path: Path, whole: Any) -> None:
    """Each expert as the library compresses the matrix that transformers computes with."""
    base = make(tmp_path / "base", kind)
    name, experts = experts_of(base)
    out = written(base, tmp_path / "out", *quants)
    for quant, path in out.items():
        assert sum(tensor.dim() == 3 for tensor in stored(base).values()) == 2, "stacked"
        ours = stored(path)
        own = {key for key in ours if ".experts." in key}
        owner = next(iter(own)).partition(".experts.")[0]
        assert owner.rpartition(".")[2] == name.split(".")[-2]
        assert not any(".experts.down_proj" in key or "linear.weight" in key for key in own)
        for number in range(2):
            matrices = {
                f"{owner}.experts.{number}.{part}.weight": matrix.contiguous()
                for part, matrix in by_transformers(experts, number).items()
            }
            *pair, down = matrices
            expected = by_the_library({key: matrices[key] for key in pair}, quant)
            expected |= by_the_library({down: matrices[down]}, quant)
            assert {key for key in own if f".experts.{number}." in key} == expected.keys()
            for key, value in expected.items():
                assert torch.equal(ours[key].view(torch.uint8), value.contiguous().view(torch.uint8)), (quant, key)
        assert not differences(base, path, quant)[1]


def test_both_ways(tmp_path: Path) -> None:
    """Qwen3-VL's files have (experts, in, out), those that transformers 5 saves the other way round."""
    made = [make(tmp_path / f"base{hub}", "qwen3_vl_moe", hub=hub) for hub in (False, True)]
    assert not torch.equal(*(stored(base)["model.language_model.layers.0.mlp.experts.down_proj"] for base in made))
    first, second = (written(base, tmp_path / f"out{base.name}", "fp8")["fp8"] / WEIGHTS for base in made)
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Path]]:
    """A base, an adapter on its experts, and the exports of both."""
    place = tmp_path_factory.mktemp("adapted")
    base = make(place / "base", "llama4_text")
    targets = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    adapter = make_adapter(place / "adapter", base, target_modules=["q_proj"], target_parameters=targets)
    return base, adapter, written(base, place / "out", *FEW, adapters=(adapter,))


@pytest.mark.parametrize("quant", FEW)
def test_an_adapter_on_the_experts(quant: str, adapted: tuple[Path, Path, dict[str, Path]]) -> None:
    """Read back, the experts are those of the fold; without the adapter they are others: the control."""
    base, adapter, exports = adapted
    out = exports[quant]
    found, missing = differences(base, out, quant, adapter)
    experts = [one for one in found if "experts" in one.name and "shared" not in one.name]
    assert not missing and len(experts) == 2
    without, _ = differences(base, out, quant)
    for one in experts:
        control = next(other for other in without if other.name == one.name)
        assert one.nmse < 0.02 < control.nmse
        assert one.worst < 1


def test_refusals(tmp_path: Path) -> None:
    """gpt-oss, types of which nobody says how they lie, and shapes that are not those of the type."""
    base = make_model(tmp_path / "gpt_oss", "gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    with pytest.raises(
        ExportError, match=r"gate_up_proj: experts in one tensor; vLLM 0\.32 reads no compressed-tensors"
    ):
        written(base, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


ARCHITECTURES = {"llama4_text": "Llama4ForCausalLM"}


@pytest.mark.engine
@pytest.mark.slow
def test_where_vllm_puts_them(tmp_path: Path) -> None:
    """vLLM's own loader brings each expert's codes and scales to the place to which it brings that expert of 16 bits.

    In fp8: its build for CPUs has kernels for the experts of no other scheme here, and makes no layer without.
    """
    exports: list[Path] = []
    for kind, architecture in ARCHITECTURES.items():
        base = make(tmp_path / kind, kind, architectures=[architecture])
        exports += [base, written(base, tmp_path / "out" / kind, "fp8")["fp8"]]
    out = tmp_path / "loaded"
    out.mkdir()
    command = [sys.executable, vllm_weights.__file__, str(out), *map(str, exports)]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.read_text() for path in out.glob("*.txt")] == []
    for number, kind in enumerate(ARCHITECTURES):
        plain, quantized = (load_file(out / f"{2 * number + more}.safetensors") for more in (0, 1))
        names = [name for name in plain if name.endswith(("experts.w13_weight", "experts.w2_weight"))]
        assert len(names) == 2, kind
        for name in names:
            expected = plain[name].float()
            values = quantized[name].float() * quantized[f"{name}_scale"].float()
            wrong = {"as it is": values, "the control": values.flip(0)}
            shares = {case: float((other - expected).norm() / expected.norm()) for case, other in wrong.items()}
            assert shares["as it is"] < 0.05 < shares["the control"], (kind, name, shares)
