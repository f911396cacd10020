"""Every method of the installed PEFT that trains on rows alone: it learns, and what is saved is what was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.cli.train import NEXT, NEXT_ALONE, _next
from lora2serve.config import train_methods
from lora2serve.config.recipe import TrainRecipe
from lora2serve.data import data_sets
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenization import tokenize_all
from lora2serve.data.tokenizer import load_tokenizer
from lora2serve.errors import TrainError
from lora2serve.progress import Silent
from lora2serve.training import eval_loss, method_config
from lora2serve.training import model as models
from lora2serve.training.method_outlook import served_by
from lora2serve.training.weightless import check_adapter
from tests.support.runs import fit, logged, recipe_file
from tests.support.tiny import load_model, make_model

pytestmark = pytest.mark.engine

# What PEFT's defaults are too large for in a model 64 wide, or do not train in 20 steps; and a rate that does.
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 5, "deltaT": 2},
    "adamss": {"r": 16, "num_subspaces": 2, "subspace_rank": 2},
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 8},
    "cpt": {
        "cpt_token_ids": list(range(10, 18)),
        "opt_projection_epsilon": 20.0,
        "opt_projection_format_epsilon": 20.0,
    },
    "fourierft": {"n_frequency": 50},
    "oft": {"oft_block_size": 8},
    "pvera": {"r": 8},
    "randlora": {"r": 8},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": list(range(64))},
    "vblora": {"vector_length": 8, "num_vectors": 8, "topk": 2},
    "waveft": {"n_frequency": 50},
}
RATES = {
    "pvera": 0.3,
    "ia3": 3e-2,
    "ln_tuning": 1e-2,
    "prompt_tuning": 0.3,
    "prefix_tuning": 0.1,
    "cpt": 0.1,
    "cartridge": 0.1,
}
QUICK = ("ia3", "prompt_tuning", "cpt", "prefix_tuning", "bottleneck")
OTHERS = [
    pytest.param(method, marks=() if method in QUICK else pytest.mark.slow)
    for method in train_methods.TRAINABLE
    if method != "lora"
]


def test_every_method_of_peft_is_known() -> None:
    """A new PEFT cannot add one in silence."""
    from peft.utils.peft_types import PeftType

    import lora2serve.bottleneck  # noqa: F401 (its member of the enumeration, which another test may bring)

    known = [*train_methods.TRAINABLE, *train_methods.UNTRAINABLE]
    assert len(known) == len(set(known))
    assert {kind.value.lower() for kind in PeftType} == set(known)


def recipe_of(folder: Path, base: Path, chats: dict[str, str], method: str, **train: Any) -> Path:
    quantize = "nf4" if method in train_methods.ON_FOUR_BITS else "none"
    rate = RATES.get(method, 2e-2)
    changes = {
        "steps": 20,
        "batch_size": 24,
        "quantize": quantize,
        "learning_rate": rate,
        "options": OPTIONS.get(method, {}),
        **train,
    }
    return recipe_file(folder, base, chats, method=method, **changes)


@pytest.mark.parametrize("method", OTHERS)
def test_it_learns_and_is_saved_as_it_was_trained(
    tmp_path: Path, small: Path, chats: dict[str, str], method: str
) -> None:
    from peft import PeftModel

    run, told, recipe = fit(recipe_of(tmp_path, small, chats, method))
    losses, metrics = list(logged(run).values()), run.record.metrics
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    assert metrics.base and metrics.tuned and metrics.tuned.eval_loss < metrics.base.eval_loss
    assert json.loads((run.adapter / "adapter_config.json").read_text())["peft_type"] == method.upper()
    again = PeftModel.from_pretrained(load_model(small), run.adapter).eval()
    template = ChatTemplate(load_tokenizer(small))
    held_out = tokenize_all(data_sets.read(chats["eval"]), template, recipe.data, Silent())
    loss = eval_loss.evaluate(again, held_out, template.tokenizer.pad_token_id, 4, Silent(), "").mean()
    on_full = metrics.tuned_on_original or metrics.tuned
    assert loss.eval_loss == pytest.approx(on_full.eval_loss, abs=1e-5)
    assert abs(loss.eval_loss - metrics.base.eval_loss) > 1e-4, "the control: the base is another model"
    words = [*told.notes, *told.warnings]
    assert any(line.startswith(f"{method} ") and "--target" in line for line in words) or any(
        f"{method}: no target can hold it" in line for line in told.warnings
    ), "who will serve it is said"


FAMILIES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "llama": ({}, {"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
    "qwen3": ({"head_dim": 16}, {"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
    "gemma2": ({"head_dim": 16}, {"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
    "phi3": ({}, {"qkv_proj", "down_proj"}, {"down_proj"}),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, {"k_proj", "v_proj", "fc2"}, {"fc2"}),
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, {"c_attn", "mlp.c_proj"}, {"mlp.c_proj"}),
    "gpt_neox": ({}, {"query_key_value", "dense_4h_to_h"}, {"dense_4h_to_h"}),
    "smollm3": ({}, {"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}, {"k_proj", "v_proj"}, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_finds_its_projections(tmp_path: Path, family: str) -> None:
    """As its paper has them, in families that PEFT has no table for, too."""
    sizes, targets, back = FAMILIES[family]
    found = method_config.ia3_modules(load_model(make_model(tmp_path / "m", family, **sizes)))
    assert {name.removeprefix("self_attn.") for name in found["target_modules"]} == targets
    assert set(found["feedforward_modules"]) == back


def test_ia3_with_named_targets(tmp_path: Path) -> None:
    """Which of them scale their input follows from the model."""
    model = load_model(make_model(tmp_path / "m"))
    recipe = TrainRecipe("ia3", {"target_modules": ["v_proj", "down_proj"]}, quantize="none")
    config = method_config.adapter_config(model, recipe, tmp_path)
    assert (config.target_modules, config.feedforward_modules) == ({"v_proj", "down_proj"}, {"down_proj"})


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("loha", {"target_modules": ["q_prj"]}, "train.options.target_modules: no module 'q_prj' in this model (did you"),
    ("loha", {"modules_to_save": ["hed"]}, "train.options.modules_to_save: no module 'hed'"),
    ("hra", {"target_modules": ["lm_head"]}, "train.options.target_modules: lm_head is the head of this model"),
    ("ln_tuning", {"target_modules": ["nrm"]}, "train.options.target_modules: no module 'nrm' in this model (did you"),
    ("boft", {"boft_block_size": 7}, "train.options: "),
    ("loha", {"modules_to_save": ""}, "train.options: modules_to_save cannot be applied to modules of type"),
    ("adalora", {"init_r": 10**30}, "train.options: randn(): argument 'size' failed to unpack"),
    ("cpt", {"cpt_token_ids": [10, -1]}, "train.options.cpt_token_ids: -1, expected ids of tokens, 0 to 1535"),
    ("trainable_tokens", {"token_indices": [1536]}, "train.options.token_indices: 1536, expected ids of tokens"),
    ("prompt_tuning", {"num_virtual_tokens": 0}, "train.options.num_virtual_tokens: 0, expected 1 to 127"),
    ("prefix_tuning", {"num_virtual_tokens": 128}, "train.options.num_virtual_tokens: 128, expected 1 to 127"),
    ("adalora", {"trainable_token_indices": [10**9]}, "train.options: index 1000000000 is out of bounds"),
    ("adalora", {"init_r": 6, "target_r": 4, "tinit": 30}, "train.options: tinit 30 and tfinal 0, expected fewer than"),
]


@pytest.mark.parametrize(("method", "options", "said"), WRONG)
def test_what_a_model_cannot_carry(
    tmp_path: Path, small: Path, chats: dict[str, str], method: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(TrainError) as caught:
        fit(recipe_of(tmp_path, small, chats, method, options=options))
    assert caught.value.message.startswith(said), caught.value.message


def test_biases_alone_need_some(small: Path) -> None:
    """Before the first step: no export could hold what BEFT learns on a module without one."""
    (warning,) = check_adapter(small, TrainRecipe("beft"), models.device())
    assert "no target holds those of modules without one: model.layers.*.mlp.down_proj, " in warning
    assert served_by("beft") == (SERVED, False)
    biased = make_model(small.parent / "biased", attention_bias=True)
    assert check_adapter(biased, TrainRecipe("beft", {"target_modules": ["q_proj"]}), models.device()) == []


@pytest.mark.parametrize("method", ["bottleneck", "prefix_tuning", "ia3"])
def test_what_comes_next_is_what_can_be(tmp_path: Path, small: Path, method: str) -> None:
    """No export is advised or planned of a kind that no target holds."""
    run = Run(tmp_path / "run")
    run.adapter.mkdir(parents=True)
    (run.adapter / "adapter_config.json").write_text(json.dumps({"peft_type": method.upper()}))
    file = recipe_file(tmp_path, small, {"train": "rows.jsonl"}, method=method)
    assert _next(run) == (NEXT if method == "ia3" else NEXT_ALONE)
    assert ("vllm" in lora2serve.plan(file).disk) == (method == "ia3")


SERVED = (
    "beft is served by --target vllm, gguf, ollama, lmstudio (merged into modules with a bias); not by adapter, "
    "gguf-adapter, ollama --as adapter: BEFT changes no matrix, and such an adapter holds LoRAs of matrices"
)


GOES_ON: list[tuple[str, dict[str, Any]]] = [
    ("prompt_tuning", {}),
    ("bottleneck", {}),
    ("adalora", {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1}),
]


@pytest.mark.parametrize(("method", "options"), GOES_ON)
def test_it_goes_on_after_a_stop(
    tmp_path: Path, small: Path, chats: dict[str, str], method: str, options: dict[str, Any]
) -> None:
    """As an unbroken run does; AdaLoRA with its ranks and the scores by which it deals them out."""
    file = recipe_of(tmp_path, small, chats, method, steps=6, batch_size=4, options=options)
    whole, _, _ = fit(file)
    broken = Run(Path(shutil.copytree(whole.path, tmp_path / "broken")))
    shutil.rmtree(broken.path / "checkpoints" / "checkpoint-6")
    broken.save(replace(broken.record, finished=False))
    again, _, _ = fit(file, into=broken.path, resume=True)
    assert logged(again) == pytest.approx(logged(whole), abs=1e-6)
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, again))
    assert first.keys() == second.keys() and first
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    configs = [json.loads((run.adapter / "adapter_config.json").read_text()) for run in (whole, again)]
    assert configs[0].get("rank_pattern") == configs[1].get("rank_pattern")
    assert method != "adalora" or any(not all(ranks) for ranks in configs[0]["rank_pattern"].values())


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in train_methods.TRAINABLE if method != "lora"])
def test_on_four_bits(tmp_path: Path, method: str) -> None:
    """What is said to compute with packed weights gives the logits of the same weights unpacked; the others break."""
    import bitsandbytes as bnb
    from peft import PeftModel

    base = make_model(tmp_path / "m", hidden_size=128, intermediate_size=256)
    recipe = TrainRecipe(method, OPTIONS.get(method, {}), quantize="nf4")
    model, unpacked = models.load_base(base, recipe, models.device()), load_model(base)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            unpacked.get_submodule(name).weight.data = weight.float()
    ids = torch.arange(5, 25)[None]
    if method not in train_methods.ON_FOUR_BITS:
        with pytest.raises((RuntimeError, TrainError)):
            learned_on(model, recipe, base, ids)
        return
    tuned = learned_on(model, recipe, base, ids)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(unpacked, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=ids).logits, again(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def learned_on(model: Any, recipe: TrainRecipe, base: Path, ids: torch.Tensor) -> Any:
    """``model`` with an adapter after one step; RuntimeError where it has no gradient."""
    config = method_config.adapter_config(model, recipe, base)
    tuned = models.add_adapter(models.prepare(model, checkpointing=False), config)
    learned = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    logits = tuned(input_ids=ids).logits[0, -ids.shape[1] :]
    torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).backward()
    if not any(parameter.grad is not None and parameter.grad.any() for parameter in learned):
        raise RuntimeError("no gradient")
    torch.optim.AdamW(learned, lr=1e-2).step()
    return tuned.eval()
