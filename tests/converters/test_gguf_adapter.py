"""Adapters as GGUF and the layout of LM Studio, in real llama.cpp against transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from converters.gguf.gguf_adapter_reader import GgufAdapterReader
from lora2serve.api.export_model import plan_export
from lora2serve.api.export_request import ExportRequest
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.run import Run
from lora2serve.exporting.sinks import ExportModel
from lora2serve.exporting.stream import PlannedOutput
from tests.conftest import lora2serve
from tests.support.folding import fold
from tests.support.runs import DEMO

IDS = list(range(20, 90))


def by_llama_cpp(model: Path, adapter: Path | None = None) -> np.ndarray:
    from llama_cpp import Llama

    llm = Llama(str(model), n_ctx=128, logits_all=True, lora_path=str(adapter) if adapter else None, verbose=False)
    llm.eval(IDS)
    return np.array(llm.scores[: len(IDS)], dtype=np.float64)


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    got, expected = (part - part.mean(axis=1, keepdims=True) for part in (got, expected))
    return float(((got - expected) ** 2).sum() / (expected**2).sum())


@pytest.fixture(scope="module")
def base(demo_run: Run) -> Path:
    return Path(demo_run.record.base.path)


@pytest.fixture(scope="module")
def base_gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("base-gguf"), base, "-t", "gguf", "-q", "F32")


@pytest.fixture(scope="module")
def by_base(base_gguf: Path) -> np.ndarray:
    return by_llama_cpp(base_gguf)


@pytest.fixture(scope="module")
def loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def exported(out: Path, *words: str | Path) -> Path:
    """The GGUF of an export, by the command line in this process: a new one would take seconds to start."""
    from lora2serve.cli import run

    assert run(["export", *map(str, words), "-o", str(out)]) == 0
    return next(out.rglob("*.gguf"))


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"v_proj": 3},
            "target_modules": ["q_proj", "k_proj", "v_proj"],
        },
        {"target_modules": ["o_proj", "lm_head"]},
    ],
)
def test_equals_peft(
    base: Path, base_gguf: Path, by_base: np.ndarray, loaded: Any, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """Patterns and rsLoRA come out right; the control, the base without the adapter, is far off."""
    from peft import PeftModel

    from tests.support.tiny import make_adapter

    adapter = make_adapter(tmp_path / "adapter", base, std=0.05, **kind)
    file = exported(tmp_path / "out", adapter, "--base", base, "-t", "gguf-adapter")
    request = ExportRequest((adapter,), ("gguf-adapter",), base=base, out=tmp_path / "planned")
    assert list(plan_export(request).outputs.values()) == [PlannedOutput(1, file.stat().st_size)]
    tuned = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        expected = tuned(torch.tensor([IDS])).logits[0].double().numpy()
    tuned.unload()
    assert nmse(by_llama_cpp(base_gguf, file), expected) < 1e-5
    assert nmse(by_base, expected) > 1e-3


YARN = {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "original_max_position_embeddings": 128}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 64, "sliding_window": 32, "rope_parameters": YARN},
}


def on_experts(kind: str, place: Path) -> tuple[Path, Path, Path]:
    """A base, a LoRA on its experts, and its GGUF."""
    from tests.support.tiny import make_adapter, make_model

    shape = {"vocab_size": 1536, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    base = make_model(place / "base", kind, seed=4, **shape, **MOE[kind])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((DEMO / "base" / name).read_bytes())
    weights = {n: t * 4 if t.dim() > 1 else t for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})  # large enough for every expert to matter
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = make_adapter(place / "adapter", base, target_modules=["q_proj"], target_parameters=experts, std=0.2)
    return base, adapter, exported(place / "out", adapter, "--base", base, "-t", "gguf-adapter")


SOME = ["mixtral", "gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", SOME)
def test_on_experts(kind: str, tmp_path: Path) -> None:
    """LoRA on the experts of each family that stores them otherwise: as planned, and read back as the fold."""
    base, adapter, file = on_experts(kind, tmp_path)
    request = ExportRequest((adapter,), ("gguf-adapter",), base=base, out=tmp_path / "planned")
    assert list(plan_export(request).outputs.values()) == [PlannedOutput(1, file.stat().st_size)]
    names = {tensor.name for tensor in GGUFReader(file).tensors}
    assert {f"blk.0.ffn_{part}_exps.weight.lora_{side}" for part in ("gate", "up", "down") for side in "ab"} <= names
    model = ExportModel(fold(base, (adapter,)), {}, "adapter", str(base), adapter)
    reader = GgufAdapterReader(tmp_path / "out" / "gguf-adapter", Manifest(), model)
    assert reader.differences == [] and len(reader.wanted) == len(model.source.changed())
    for spec in (spec for spec in model.source.specs() if spec.name in reader.wanted):
        _, planned, stored = reader.pair(spec, slice(0, spec.rows), model.source.read(spec.name).values)
        assert torch.allclose(planned, stored, atol=1e-4, rtol=1e-4), spec.name


@pytest.mark.engine
@pytest.mark.parametrize("kind", SOME)
def test_llama_cpp_computes_it_on_experts(kind: str, tmp_path: Path) -> None:
    """In llama.cpp it is PEFT's."""
    from peft import PeftModel

    from tests.support.tiny import load_model

    base, adapter, file = on_experts(kind, tmp_path)
    base_gguf = exported(tmp_path / "base-gguf", base, "-t", "gguf", "-q", "F32")
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(load_model(base), adapter)
        expected = tuned(torch.tensor([IDS])).logits[0].double().numpy()
    merged = exported(tmp_path / "merged", adapter, "--base", base, "-t", "gguf", "-q", "F32")
    beside, folded, alone = by_llama_cpp(base_gguf, file), by_llama_cpp(merged), by_llama_cpp(base_gguf)
    assert nmse(beside, folded) < 1e-3, "as the merged model"
    assert nmse(beside, expected) < 1e-3, "as PEFT"
    assert nmse(alone, expected) > 1e-2, "the control"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector does not fit"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight was trained in full"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
        ({"init_lora_weights": "olora"}, "took a part of the base"),
    ],
)
def test_refused_by_name(
    base: Path, tmp_path: Path, kind: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from lora2serve.cli import run
    from tests.support.tiny import make_adapter

    adapter = make_adapter(tmp_path / "adapter", base, **kind)
    assert run(["export", str(adapter), "--base", str(base), "-t", "gguf-adapter", "-o", str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    assert message in err
    assert "--target gguf merges it" in err


def test_lmstudio(demo_run: Run, demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    """Two folders deep, the same bytes as the GGUF target's, which name their run, and the line that imports it."""
    (directory,) = lora2serve(
        "export", demo_run.path, "-t", "lmstudio", "-q", "Q8_0", "-o", tmp_path, cwd=tmp_path
    ).split()
    manifest = json.loads((Path(directory) / "lora2serve.json").read_text())
    assert list(manifest["files"]) == ["lora2serve/demo/demo-Q8_0.gguf"]
    plain = demo_exports["gguf-Q8_0"] / "demo-Q8_0.gguf"
    assert (Path(directory) / "lora2serve/demo/demo-Q8_0.gguf").read_bytes() == plain.read_bytes()
    assert manifest["use"].startswith("lms import --copy --user-repo lora2serve/demo ")
    assert GGUFReader(plain).fields["lora2serve.run"].contents() == manifest["run"]
