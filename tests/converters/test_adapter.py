"""The adapter target: the product answers as the source, and what vLLM cannot serve is refused before a byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from converters.adapter.adapter_sink import KEPT_KEYS, engine_check
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel, find
from lora2serve.exporting.stream import Plan, export
from lora2serve.progress import Silent
from tests.merge.test_binding import TWO_CLASSES, make_multimodal
from tests.support.folding import fold, stored
from tests.support.tiny import load_model, make_adapter, make_model, merged_by_peft, model_state

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "llama")


def write(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    """The true export."""
    exporter = find("adapter")
    merged = fold(base, [adapter])
    model = ExportModel(merged, {}, "tiny", str(base), adapter)
    return export(model, [Plan("adapter", exporter, exporter.Options(**options), out)], Silent())[0].path


def config_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "adapter_config.json").read_text()))


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def distance(base: Path, one: Path, other: Path) -> float:
    """Largest difference between the two merged models, PEFT doing both merges in float32."""
    return largest_difference(merged_by_peft(base, one), merged_by_peft(base, other))


LOSSLESS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "odd rank": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 9, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 6}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}


RARE_LOSSLESS = ("plain", "rslora and patterns")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW if kind in RARE_LOSSLESS else ()) for kind in LOSSLESS])
def test_lossless(kind: str, base: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "source", base, **LOSSLESS[kind])
    product = write(base, source, tmp_path / "out", served_base="served")
    config = config_of(product)
    assert config["r"] in (1, 8, 16, 32) and not {"use_rslora", "rank_pattern", "alpha_pattern"} & config.keys()
    assert config["base_model_name_or_path"] == "served"
    assert config.keys() <= {
        *KEPT_KEYS,
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "target_modules",
        "bias",
        "inference_mode",
    }, "nothing about training"
    broken = stored(source)
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    save_file({k: v * 1.1 if "lora_B" in k else v for k, v in broken.items()}, scaled / "adapter_model.safetensors")
    (scaled / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    want, have, other = (merged_by_peft(base, adapter) for adapter in (source, product, scaled))
    assert largest_difference(want, have) < 2e-7
    assert largest_difference(other, have) > 1e-3, "the control: alpha times 1.1 is seen"


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=SLOW),
        {"rank_pattern": {"down_proj": 2}, "use_rslora": True},
        pytest.param({"rank_pattern": {"down_proj": 2}}, marks=SLOW),
        pytest.param({"use_rslora": True}, marks=SLOW),
    ],
    ids=str,
)
def test_experts(more: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's ``target_parameters``: the ranks of all experts lie in one tensor, and each is padded by itself."""
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    base = make_model(tmp_path / "moe", "qwen3_moe", num_hidden_layers=1, **shape)
    source = make_adapter(tmp_path / "source", base, r=3, target_modules=["q_proj"], target_parameters=EXPERTS, **more)
    product = write(base, source, tmp_path / "out")
    assert config_of(product)["r"] == 8 and set(config_of(product)["target_parameters"]) == set(EXPERTS)
    name = next(name for name in stored(product) if "experts.lora_A" in name)
    assert stored(product)[name].shape[0] == 4 * 8
    want, have = (merged_by_peft(base, adapter) for adapter in (source, product))
    assert largest_difference(want, have) < 2e-7
    assert largest_difference(have, model_state(base)) > 1e-3, "the control"


@pytest.mark.engine
def test_vllm_has_the_last_word() -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    engine_check(config)
    with pytest.raises(ExportError, match=r"vLLM refuses the adapter: .*DoRA"):
        engine_check({**config, "use_dora": True})


@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "import vllm.config.lora"])
def test_vllm_is_asked_without_a_word(word: str) -> None:
    """A program that exports is not spoken to; the control is vLLM's own import."""
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    code = word or f"from converters.adapter.adapter_sink import engine_check; engine_check({config})"
    if word and torch.version.cuda:
        pytest.skip("vLLM's build for CPUs speaks")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert bool(done.stdout + done.stderr) == bool(word), done.stderr


def test_values_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "source", base, r=3)
    before, after = stored(source), stored(write(base, source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        rows, columns = value.shape
        assert torch.equal(after[name][:rows, :columns], value) and after[name].dtype == value.dtype
        assert int(after[name].count_nonzero()) == int(value.count_nonzero())


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=SLOW)])
def test_rebased_becomes_plain(init: str, base: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "source", base, init_lora_weights=init, r=4)
    product = write(base, source, tmp_path / "out")
    assert config_of(product)["r"] == 8
    about = json.loads((product / "lora2serve.json").read_text())
    assert about["lossless"] and max(about["relative_error"].values()) < 1e-4
    assert distance(base, source, product) < 1e-4


REFUSED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora-bias": {"lora_bias": True},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "trained-tokens": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("rule", REFUSED)
def test_refused(rule: str, base: Path, tmp_path: Path) -> None:
    changes = {"target_modules": ["gate_proj"], **REFUSED[rule]}
    if rule in ("bias", "lora-bias"):
        base = make_model(tmp_path / "biased", mlp_bias=True, attention_bias=True)
    source = make_adapter(tmp_path / "source", base, **changes)
    with pytest.raises(ExportError, match=rule) as refused:
        write(base, source, tmp_path / "out")
    assert "--target vllm" in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_extract_dora(base: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "source", base, use_dora=True, std=0.01)
    with pytest.raises(ExportError, match=r"rank 1 loses .*worst: model\.layers"):
        write(base, source, tmp_path / "small", as_lora_rank=1)
    assert not (tmp_path / "small").exists()
    product = write(base, source, tmp_path / "out", as_lora_rank=64)
    about = json.loads((product / "lora2serve.json").read_text())
    assert not about["lossless"] and len(about["relative_error"]) == 6
    assert distance(base, source, product) < 1e-4


def test_extract_reports_the_true_error(base: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "source", base, r=12, std=0.05)
    product = write(base, source, tmp_path / "out", as_lora_rank=10)
    said = json.loads((product / "lora2serve.json").read_text())["relative_error"]
    want, have = (merged_by_peft(base, adapter) for adapter in (source, product))
    start = model_state(base)
    for name, error in said.items():
        measured = float(torch.linalg.norm(want[name] - have[name]) / torch.linalg.norm(want[name] - start[name]))
        assert measured == pytest.approx(error, rel=0.02)
        assert 0.01 < error < 0.3


def test_extract_trained_head(base: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "source", base, modules_to_save=["lm_head"], std=0.01)
    product = write(base, source, tmp_path / "out", as_lora_rank=64)
    assert any("lm_head" in name for name in stored(product))
    assert distance(base, source, product) < 1e-5


def test_large_matrix_by_random_range() -> None:
    from converters.adapter.extract import low_rank

    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(700, 8, generator=generator) @ torch.randn(8, 500, generator=generator)
    noisy = exact + 0.05 * torch.randn(700, 500, generator=generator)
    b, a = low_rank(exact, 8)
    assert float(torch.linalg.norm(exact - b @ a) / torch.linalg.norm(exact)) < 1e-5
    b, a = low_rank(noisy, 8)
    u, s, vh = torch.linalg.svd(noisy)
    best = float(torch.linalg.norm(noisy - (u[:, :8] * s[:8]) @ vh[:8]))
    assert float(torch.linalg.norm(noisy - b @ a)) < best * 1.001


def test_copies_of_the_base_are_left_out(base: Path, tmp_path: Path) -> None:
    """PEFT saves embeddings along; only where they changed is that a reason to refuse."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    source = tmp_path / "source"
    model = get_peft_model(load_model(base), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(source, save_embedding_layers=True)
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    extra = [name for name in tensors if "embed_tokens" in name]
    assert extra
    tensors = {n: torch.randn_like(t) * 0.05 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(tensors, file)
    product = write(base, source, tmp_path / "out")
    assert not [name for name in stored(product) if "embed_tokens" in name]
    tensors[extra[0]] = tensors[extra[0]] + 0.01
    save_file(tensors, file)
    with pytest.raises(ExportError, match="tensors"):
        write(base, source, tmp_path / "out2")


RARE = [pytest.param(kind, marks=SLOW) for kind in ("qwen3_5", "mllama")]
ENGINE = [pytest.param("llama4", marks=pytest.mark.engine)]


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "gemma3", *ENGINE, *RARE])
def test_the_base_s_own_names(tmp_path: Path, kind: str) -> None:
    """Trained as a language model, served as the multimodal class: vLLM leaves out what it has no module for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text, config, experts = TWO_CLASSES[kind]
    base = make_multimodal(tmp_path / "base", kind, text, **config)
    fused = {"target_parameters": experts} if kind == "qwen3_5_moe" else {}
    source = make_adapter(tmp_path / "source", base, target_modules=["q_proj"], exclude_modules=".*vision.*", **fused)
    product = write(base, source, tmp_path / "out")
    one, two = (fold(base, [adapter]) for adapter in (source, product))
    assert one.changed() == two.changed()
    assert all(torch.allclose(one.read(n).values.float(), two.read(n).values.float()) for n in one.changed())
    parsed = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        modules = dict(AutoModelForImageTextToText.from_config(parsed).named_modules())
        trained = dict(AutoModelForCausalLM.from_config(parsed).named_modules())
    names = config_of(product)["target_modules"]
    assert names and all(name in modules for name in names)
    assert all(name in trained for name in names) == (kind == "gemma3"), "the control: one class for both"
