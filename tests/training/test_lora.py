"""What a recipe says about the adapter is what PEFT builds and keeps: targets, variants, inits, modules in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.artifacts.run import Run
from lora2serve.errors import TrainError
from lora2serve.training import lora_targets
from lora2serve.training import model as models
from tests.support.runs import DEMO, fit, recipe_file
from tests.support.tiny import load_model, make_model

pytestmark = pytest.mark.engine


def config_of(run: Run) -> dict[str, Any]:
    return json.loads((run.adapter / "adapter_config.json").read_text())


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def trained_leaves(run: Run) -> set[str]:
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors_of(run) if ".lora_A" in name}


def logits(path: Path, adapter: Path, base: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), adapter).eval()
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


LLAMA = {
    "qv": {"q_proj", "v_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qv-mlp": {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    "all-linear": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}


@pytest.mark.parametrize("preset", LLAMA)
def test_presets_on_a_quantized_llama(tmp_path: Path, small: Path, chats: dict[str, str], preset: str) -> None:
    run, _, _ = fit(recipe_file(tmp_path, small, chats, steps=1, lora={"targets": preset, "rank": 4}))
    assert trained_leaves(run) == LLAMA[preset]
    assert {t.shape[0] for name, t in tensors_of(run).items() if "lora_A" in name} == {4}


OTHERS = [
    ("gpt2", "qv", {"c_attn"}),
    ("gpt2", "attention", {"attn.c_attn", "attn.c_proj"}),
    ("gpt2", "qv-mlp", {"attn.c_attn", "mlp.c_fc", "mlp.c_proj"}),
    ("gpt_neox", "attention", {"attention.dense", "attention.query_key_value"}),
    ("qwen3_moe", "all-linear", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
]


@pytest.mark.parametrize(("kind", "preset", "expected"), OTHERS)
def test_presets_on_other_families(tmp_path: Path, kind: str, preset: str, expected: set[str]) -> None:
    """GPT-2 has a ``c_proj`` in attention and another in the MLP; routers and heads are never adapted."""
    extra = {"num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1} if kind == "qwen3_moe" else {}
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {}
    model = load_model(make_model(tmp_path / "m", kind, **extra, **sizes))
    chosen = lora_targets.targets(model, preset)
    paths = lora_targets.linear_modules(model)
    hit = {".".join(path.split(".")[-2:]) for path in paths if any(f".{path}".endswith(f".{end}") for end in chosen)}
    assert {name if "." in min(expected) else name.rsplit(".", 1)[-1] for name in hit} == expected


def test_a_list_of_targets(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    wanted = ["q_proj", "layers.1.mlp.down_proj"]
    run, _, _ = fit(recipe_file(tmp_path, small, chats, steps=1, lora={"targets": wanted}))
    assert {name.split(".lora_")[0].split("layers.")[1] for name in tensors_of(run)} == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.down_proj",
    }


@pytest.mark.parametrize(
    ("lora", "said", "hint"),
    [
        ({"targets": ["q_prj", "v_proj"]}, "no module 'q_prj' in this model (did you mean 'q_proj'?)", "down_proj"),
        ({"modules_to_save": ["lm_hed"]}, "no module 'lm_hed' in this model (did you mean 'lm_head'?)", "lm_head"),
        ({"targets": ["lm_head"], "modules_to_save": ["lm_head"]}, "train.lora", ""),
    ],
)
def test_a_module_that_is_not_there(
    tmp_path: Path, small: Path, chats: dict[str, str], lora: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(TrainError) as caught:
        fit(recipe_file(tmp_path, small, chats, lora=lora))
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    plain, _, _ = fit(recipe_file(tmp_path / "a", small, chats, steps=1, lora={"rank": 16, "alpha": 8}))
    root, _, _ = fit(recipe_file(tmp_path / "b", small, chats, steps=1, lora={"rank": 16, "alpha": 8, "rslora": True}))
    assert (config_of(plain)["use_rslora"], config_of(root)["use_rslora"]) == (False, True)
    from peft import PeftModel

    for run, scale in ((plain, 8 / 16), (root, 8 / 4)):
        model = PeftModel.from_pretrained(load_model(small), run.adapter)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == scale


def test_dora_trains_magnitudes(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    run, _, _ = fit(recipe_file(tmp_path, small, chats, steps=3, lora={"dora": True, "targets": "qv"}))
    magnitudes = {n: t for n, t in tensors_of(run).items() if "lora_magnitude_vector" in n}
    assert len(magnitudes) == 4
    base = dict(load_model(small).state_dict())
    for name, magnitude in magnitudes.items():
        weight = base[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
        norm = weight.norm(dim=1)
        assert torch.allclose(magnitude, norm, rtol=0.3), "near the norm of each row"
        assert not torch.allclose(magnitude, norm, rtol=1e-6), "and moved away from it"
    assert {t.dtype for t in magnitudes.values()} == {torch.float32}


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4"])
def test_every_init_gives_a_lora_for_the_true_base(
    tmp_path: Path, small: Path, chats: dict[str, str], init: str
) -> None:
    """PiSSA and OLoRA take a part of the base out; what is kept must answer on the base as it is on disk."""
    lora = {"init": init, "rank": 4, "alpha": 8}
    run, _, _ = fit(recipe_file(tmp_path, small, chats, steps=3, quantize="none", lora=lora))
    assert config_of(run)["init_lora_weights"] in (True, init)
    metrics, base = run.record.metrics, load_model(small).eval()
    with torch.no_grad():
        shift = (logits(run.path, run.adapter, small) - base(torch.arange(5, 25)[None]).logits).abs().max()
    assert 1e-3 < shift < 20
    from lora2serve.config.data_recipe import DataRecipe
    from lora2serve.data import data_sets, tokenization
    from lora2serve.data.served_template import ChatTemplate
    from lora2serve.data.tokenizer import load_tokenizer
    from lora2serve.progress import Silent
    from lora2serve.training import eval_loss

    template = ChatTemplate(load_tokenizer(small))
    held_out = tokenization.tokenize_all(data_sets.read(chats["eval"]), template, DataRecipe(train=""), Silent())
    from peft import PeftModel

    on_disk = eval_loss.evaluate(PeftModel.from_pretrained(base, run.adapter), held_out, 0, 4, Silent(), "").mean()
    assert on_disk.eval_loss == pytest.approx(metrics.tuned.eval_loss, abs=1e-3)
    plain = eval_loss.evaluate(load_model(small), held_out, 0, 4, Silent(), "").mean()
    assert metrics.base.eval_loss == pytest.approx(plain.eval_loss, abs=1e-5), "the base is the true base"
    assert metrics.tuned.eval_loss < metrics.base.eval_loss - 2e-3, "the control: training did something"


def test_a_rebasing_init_on_a_base_that_is_quantized_already(tmp_path: Path, small: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lora2serve.config.recipe import LoraRecipe, TrainRecipe

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32, quantization_config=config)
    with pytest.raises(TrainError, match="takes a part of the base out"):
        models.lora_config(models.prepare(model, checkpointing=False), TrainRecipe(lora=LoraRecipe(init="pissa")))


def test_modules_to_save_are_trained_in_full(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    lora = {"modules_to_save": ["embed_tokens", "lm_head"], "targets": "qv"}
    run, told, _ = fit(recipe_file(tmp_path, small, chats, steps=2, lora=lora))
    saved = tensors_of(run)
    base = dict(load_model(small).state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kept = saved[f"base_model.model.{name}"]
        assert kept.shape == base[name].shape
        assert not torch.equal(kept.float(), base[name]), "it has moved"
    assert any("embed_tokens, lm_head trained in full" in warning for warning in told.warnings)


def test_dropout_only_while_training(tmp_path: Path, chats: dict[str, str]) -> None:
    run, _, _ = fit(recipe_file(tmp_path, DEMO / "base", chats, steps=2, lora={"dropout": 0.5}))
    assert config_of(run)["lora_dropout"] == 0.5
    tuned, original = (run.record.metrics.measured()[name].eval_loss for name in ("tuned", "tuned_on_original"))
    assert tuned == pytest.approx(original, abs=0.1)
