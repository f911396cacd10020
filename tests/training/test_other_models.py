"""Models that are no plain transformer train, too, and what they leave out is told before their weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.config.recipe import LoraRecipe, TrainRecipe
from lora2serve.data.tokenization import Sample
from lora2serve.errors import TrainError
from lora2serve.training import finetune, lora_targets, trainer
from lora2serve.training.model import Device
from lora2serve.training.weightless import check_adapter, weightless_model
from tests.support.families import FAMILIES, HANDFUL, make_family
from tests.support.runs import fit, logged, make_chat_model, recipe_file
from tests.support.tiny import SHAPE

pytestmark = pytest.mark.engine

CPU = Device("cpu", "float32")
GPU = Device("cuda", "bfloat16")
# a linear layer whose weight no preset may adapt: read past its module by a kernel, or refused by PEFT
WITHOUT = {"falcon_h1": {"out_proj"}, "jamba": {"out_proj", "dt_proj"}, "mamba": {"out_proj", "dt_proj"}}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in HANDFUL else pytest.mark.slow) for kind in FAMILIES],
)
def test_all_linear_learns_in_every_layer_it_adapts(kind: str) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model = make_family(kind)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=lora_targets.targets(model, "all-linear"))
    adapted: Any = get_peft_model(model, config).train()
    adapted(input_ids=torch.arange(5, 25)[None]).logits.logsumexp(-1).sum().backward()
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        gradient = layer.lora_B["default"].weight.grad
        assert gradient is not None and gradient.abs().max() > 0, name
    assert not {name.rpartition(".")[2] for name in layers} & WITHOUT.get(kind, set())


@pytest.mark.parametrize(
    ("kind", "preset", "expected"),
    [
        ("nemotron_h", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),  # all its layers are called "mixer"
        ("mamba", "all-linear", {"in_proj", "x_proj"}),
        ("mamba2", "all-linear", {"in_proj"}),
        ("qwen3_next", "attention", {"in_proj_ba", "in_proj_qkvz", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)  # fmt: skip
def test_presets(kind: str, preset: str, expected: set[str]) -> None:
    assert {name.rpartition(".")[2] for name in lora_targets.targets(make_family(kind), preset)} == expected


TRAINED: Mapping[str, Mapping[str, Any]] = {
    "granitemoehybrid": {},
    "granite-experts": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "mamba": {},
    "falcon_h1": {},
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_run(tmp_path: Path, chats: dict[str, str], name: str) -> None:
    """The default preset; TRL reads the number of experts from a key that Granite 4 does not have."""
    kind = "granitemoehybrid" if name.startswith("granite") else name
    base = make_chat_model(tmp_path / "base", kind=kind, **{**FAMILIES[kind], **TRAINED[name]})
    run, told, _ = fit(recipe_file(tmp_path, base, chats, steps=3, quantize="none", lora={"rank": 4}))
    assert list(logged(run)) == [1, 2, 3]
    assert bool(logged(run, "aux_loss")) == (name == "granite-experts"), "the routers' loss, where there are routers"
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_B" in key)
    assert run.record.metrics.tuned and run.record.metrics.base
    assert run.record.metrics.tuned.eval_loss < run.record.metrics.base.eval_loss
    assert any("no LoRA on model.layers.*.block_sparse_moe" in line for line in told.warnings) == (
        name == "granite-experts"
    )


OF_EXPERTS = "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj"
WITHOUT_LORA = {
    "qwen3_moe": OF_EXPERTS,
    "mixtral": OF_EXPERTS,
    "gpt_oss": OF_EXPERTS,
    # it has linear layers of the same names, which PEFT takes for those of its experts
    "deepseek_v3": ", ".join(
        f"model.layers.*.mlp.{name}"
        for name in (
            "down_proj", "gate_proj", "up_proj",
            "shared_experts.down_proj", "shared_experts.gate_proj", "shared_experts.up_proj",
        )
    ),
}  # fmt: skip


def config_alone(folder: Path, kind: str, **changes: Any) -> Path:
    """A model directory without weights."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES[kind], **changes}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", WITHOUT_LORA)
def test_experts_are_told(tmp_path: Path, kind: str) -> None:
    base = config_alone(tmp_path, kind)
    told = check_adapter(base, TrainRecipe(), GPU)
    asked = "train.lora.target_parameters: experts puts one on each expert"
    either = "of a mixture of experts PEFT adapts either these or the others"
    assert told == [f"no LoRA on {WITHOUT_LORA[kind]}: {either if kind == 'deepseek_v3' else asked}"]
    assert check_adapter(base, TrainRecipe(quantize="none"), GPU) == told
    experts = TrainRecipe(lora=LoraRecipe(targets="attention", target_parameters="experts"))
    assert check_adapter(base, experts, GPU) == []
    assert check_adapter(config_alone(tmp_path / "dense", "llama"), TrainRecipe(), GPU) == [], "the control"


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_other_tensors_of_three_axes_are_no_experts(tmp_path: Path, kind: str) -> None:
    """The mixing weights of RWKV and the gates of recurrent Gemma."""
    model = weightless_model(config_alone(tmp_path, kind))
    assert model is not None and any(parameter.dim() == 3 for parameter in model.parameters())
    assert lora_targets.expert_parameters(model) == {}
    with pytest.raises(TrainError, match="no experts"):
        lora_targets.target_parameters(model, "experts")


def test_towers_are_no_experts(tmp_path: Path) -> None:
    """The vision tower of Gemma 3 has a tensor of three axes, as experts have; and linear layers without LoRA."""
    from transformers import Gemma3Config

    text = {**SHAPE, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4).save_pretrained(tmp_path)
    model = weightless_model(tmp_path)
    assert model is not None
    assert any(p.dim() == 3 and "vision_tower" in name for name, p in model.named_parameters())
    assert check_adapter(tmp_path, TrainRecipe(), GPU) == []


def test_experts_that_stay_in_16_bits(tmp_path: Path) -> None:
    """Llama 4's, whose class computes them in one way only; and those that are no whole number of blocks."""
    sizes = {"head_dim": 16, "num_local_experts": 16, "intermediate_size_mlp": 64, "num_experts_per_tok": 1}
    large = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    from transformers import Llama4TextConfig

    Llama4TextConfig(**{**SHAPE, **sizes, **large}).save_pretrained(tmp_path / "llama4")
    model = weightless_model(tmp_path / "llama4")
    assert model is not None
    size = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    (told,) = [line for line in check_adapter(tmp_path / "llama4", TrainRecipe(), GPU) if "leaves" in line]
    assert told.startswith(f"train.quantize: nf4 leaves {2 * size / 1e9:.1f} GB of experts in bfloat16: transformers")
    odd = config_alone(tmp_path / "odd", "qwen3_moe", moe_intermediate_size=20, hidden_size=44, num_attention_heads=4)
    assert any("leaves 0.0 GB of experts in bfloat16" in line for line in check_adapter(odd, TrainRecipe(), GPU))


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        ("llama", ("lm_head",), "train.lora.targets: lm_head is the head of this model"),
        ("gpt_neox", ("query_key_value", "lm_head"), "train.lora.targets: lm_head is the head"),
        ("mamba", ("in_proj", "out_proj"), "train.lora: [PEFT:PeftType.LORA] Module 'out_proj' is incompatible"),
        ("llama", ("q_prj",), "no module 'q_prj' in this model (did you mean 'q_proj'?)"),
    ],
)
def test_what_cannot_be_trained_is_refused_without_weights(
    tmp_path: Path, kind: str, targets: tuple[str, ...], said: str
) -> None:
    with pytest.raises(TrainError) as caught:
        check_adapter(config_alone(tmp_path, kind), TrainRecipe(lora=LoraRecipe(targets=targets)), CPU)
    assert said in caught.value.message
    assert check_adapter(tmp_path, TrainRecipe(), CPU) == [], "the control: the preset"


def test_a_run_is_refused_before_its_base_is_read(
    tmp_path: Path, small: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "load_base", lambda *_: pytest.fail("read"))
    with pytest.raises(TrainError, match="lm_head is the head of this model") as caught:
        fit(recipe_file(tmp_path, small, chats, lora={"targets": ["lm_head"]}))
    assert "train.lora.modules_to_save" in caught.value.hint


def test_two_gpus_without_a_launcher(
    tmp_path: Path, small: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TRL refuses: it would spread the model over both by threads."""
    arguments, counts = trainer._arguments, []

    def on_two(*values: Any) -> Any:
        made = arguments(*values)
        made._n_gpu = 2
        counts.append(made)
        return made

    monkeypatch.setattr(trainer, "_arguments", on_two)
    run, _, recipe = fit(recipe_file(tmp_path, small, chats, steps=2))
    assert list(logged(run)) == [1, 2]
    assert [made.n_gpu for made in counts] == [1]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    counts[0]._n_gpu, row = 2, [Sample([1, 2, 3], [1, 2, 3], False)]
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):  # the control
        SFTTrainer(
            AutoModelForCausalLM.from_pretrained(small),
            args=counts[0],
            train_dataset=trainer._dataset(row, recipe),
            eval_dataset=trainer._dataset(row, recipe),
            processing_class=AutoTokenizer.from_pretrained(small),
        )


def test_modules_trained_in_full_are_not_rounded(tmp_path: Path, chats: dict[str, str]) -> None:
    """TRL rounds what is trained of a 4-bit model to bfloat16; a step of nothing keeps the base's own values."""
    base = make_chat_model(tmp_path / "base", dtype=torch.float32)
    lora = {"modules_to_save": ["lm_head"], "targets": "qv"}
    run, _, _ = fit(recipe_file(tmp_path, base, chats, steps=1, learning_rate=1e-12, lora=lora))
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    kept = load_file(run.adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.allclose(kept, head, atol=1e-7, rtol=0)
    assert not torch.allclose(kept, head.bfloat16().float(), atol=1e-7, rtol=0), "the control: rounded"
