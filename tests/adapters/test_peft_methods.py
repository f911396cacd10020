"""Every method of the installed PEFT, by name: merged like PEFT's own merge, or refused with the way out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora2serve.adapters import peft_methods
from lora2serve.adapters.adapter import open_adapter
from lora2serve.config import lora_inits
from lora2serve.errors import AdapterError
from tests.support.folding import export_merged, fold, stored, worst_ulp
from tests.support.tiny import make_adapter, make_model, merged_by_peft, model_state

QV, QO = ["q_proj", "v_proj"], ["q_proj", "o_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8, "target_modules": QO},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "PVERA": {"r": 8, "target_modules": QO},
    "RANDLORA": {"r": 8, "target_modules": QO},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 7], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 8, "topk": 2},
    "VERA": {"r": 8, "target_modules": QO},
    "WAVEFT": {"n_frequency": 50},
}
MERGED = [method for method in (*peft_methods.NATIVE, *peft_methods.THROUGH_PEFT) if method != "LORA"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
}


def with_biases(path: Path) -> Path:
    """Random biases: a new model's are zeros, which a method that scales them would leave alone."""
    file = path / "model.safetensors"
    torch.manual_seed(3)
    biased = {
        n: torch.randn(t.shape).bfloat16() * 0.1 if n.endswith(".bias") else t for n, t in load_file(file).items()
    }
    save_file(biased, file, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_biases(make_model(tmp_path_factory.mktemp("base") / "qwen2", "qwen2", num_hidden_layers=1))


def check(base: Path, adapter: Path, out: Path) -> list[str]:
    """One merge against PEFT's; the names of what it changed, which are those that PEFT changed."""
    got, oracle, old = stored(export_merged(base, [adapter], out)), merged_by_peft(base, adapter), stored(base)
    if not got.keys() <= oracle.keys():  # experts lie otherwise in files than in memory
        got, old = (model_state(path, torch.bfloat16) for path in (out, base))
    worst = {name: ulp for name, ulp in worst_ulp(got, oracle).items() if ulp > 1}
    assert not worst
    changed = [name for name in got if not torch.equal(got[name], old[name])]
    assert changed == [name for name in got if not torch.equal(oracle[name].bfloat16(), old[name])]
    assert changed, "the control: something changed"
    return changed


def given(method: str) -> dict[str, Any]:
    return {"method": method, "std": 0.02, "target_modules": QV, **CONFIGS.get(method, {})}


def test_every_method_of_peft_is_known() -> None:
    """A new PEFT cannot add one in silence."""
    from peft.utils.peft_types import PeftType

    import lora2serve.bottleneck  # noqa: F401 (its member of the enumeration, which another test may bring)

    known = [*peft_methods.NATIVE, *peft_methods.THROUGH_PEFT, *peft_methods.UNMERGEABLE_METHODS]
    assert len(known) == len(set(known))
    assert {kind.value for kind in PeftType} == set(known)


def test_every_init_and_option_of_lora_is_known() -> None:
    from peft import LoraConfig

    named = {
        name
        for part in get_args(LoraConfig.__dataclass_fields__["init_lora_weights"].type)
        or get_args(__import__("typing").get_type_hints(LoraConfig)["init_lora_weights"])
        for name in get_args(part)
    }
    assert "pissa" in named
    ours = (*lora_inits.BASE_UNCHANGED, *lora_inits.REPEATABLE, *lora_inits.UNREPEATABLE)
    assert all(name.startswith(ours) for name in named), named
    handled = {
        "r", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
        "layers_to_transform", "rank_pattern", "alpha_pattern", "trainable_token_indices", "use_dora",
        "layer_replication", "lora_bias", "target_parameters", "ensure_weight_tying",
        *peft_methods.VARIANTS, *peft_methods.UNMERGEABLE,
    }  # fmt: skip
    about_training = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_pattern", "megatron_config",
        "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
        "runtime_config",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(LoraConfig)} == handled | about_training


# Those with code of their own, those that change biases, norms or embeddings, and of the others each way to lay out
# its tensors once; PEFT's layer does the rest, and make test has them all.
OFTEN = (
    *(method for method in peft_methods.NATIVE if method != "LORA"), *peft_methods.BIASED, "BOFT", "OFT", "FOURIERFT",
    "LN_TUNING", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA",
)  # fmt: skip


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method in OFTEN else pytest.mark.engine) for method in MERGED]
)
def test_equals_peft(qwen2: Path, tmp_path: Path, method: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", qwen2, **given(method))
    changed = check(qwen2, adapter, tmp_path / "out")
    biased = any(name.endswith(".bias") for name in changed)
    assert biased == peft_methods.changes_bias(open_adapter(adapter))


@pytest.mark.parametrize(
    "shape", ["qwen2", *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("llama", "gemma2"))]
)
def test_ia3_is_equal_to_the_last_bit(tmp_path: Path, shape: str) -> None:
    """Rounded once, from PEFT's own product in float32."""
    base = with_biases(make_model(tmp_path / "base", shape, num_hidden_layers=1, **SHAPES.get(shape, {})))
    adapter = make_adapter(tmp_path / "adapter", base, **given("IA3"))
    got = stored(export_merged(base, [adapter], tmp_path / "out"))
    oracle, old = merged_by_peft(base, adapter), stored(base)
    assert all(torch.equal(got[name], oracle[name].bfloat16()) for name in got)
    assert any(not torch.equal(got[name], old[name]) for name in got), "the control"


def test_biases_alone_need_some(qwen2: Path, tmp_path: Path) -> None:
    """BEFT changes nothing else: what it learned on a module without one would be lost."""
    adapter = make_adapter(tmp_path / "adapter", qwen2, method="BEFT", target_modules=["v_proj", "o_proj"])
    with pytest.raises(AdapterError, match=r"BEFT cannot be merged: no bias in .*o_proj of the base") as caught:
        export_merged(qwen2, [adapter], tmp_path / "out")
    assert (
        caught.value.hint
        == "no target can hold it: `lora2serve serve --engine peft` serves it; a LoRA goes into every target"
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [method for method in MERGED if method != "BEFT"])
def test_equals_peft_on_other_shapes(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, shape: str, method: str
) -> None:
    base = make_model(tmp_path_factory.mktemp("bases") / shape, shape, **SHAPES[shape])
    config = given(method)
    if shape == "qwen3_moe" and method == "IA3":  # PEFT targets a module, and the experts have none
        config |= {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    check(base, make_adapter(tmp_path / "adapter", base, **config), tmp_path / "out")


BESIDE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa, head": {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]},
    "pissa, biases": {"init_lora_weights": "pissa", "bias": "all", "target_modules": QV},
    "pissa, tokens": {"init_lora_weights": "pissa", "trainable_token_indices": [3, 5]},
    "pissa, embedding": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora, ranks": {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 8}, "use_rslora": True},
    "olora, own biases": {"init_lora_weights": "olora", "bias": "lora_only", "target_modules": QV},
    "qalora": {"use_qalora": True, "qalora_group_size": 8},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "loha, embedding and head": {**given("LOHA"), "modules_to_save": ["lm_head", "embed_tokens"]},
    "ia3, norm": {**given("IA3"), "modules_to_save": ["norm"]},
    "boft, biases": {**given("BOFT"), "bias": "all"},
    "vera, no projection": {**given("VERA"), "save_projection": False},
    "hira, embedding": {**given("HIRA"), "target_modules": ["embed_tokens", "q_proj"]},
}


OFTEN_BESIDE = (
    "pissa, tokens", "pissa, embedding", "olora, ranks", "olora, own biases", "qalora", "loha, embedding and head",
    "boft, biases", "vera, no projection", "hira, embedding",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in OFTEN_BESIDE else pytest.mark.engine) for case in BESIDE]
)
def test_what_lies_beside_the_layers_is_kept(qwen2: Path, tmp_path: Path, case: str) -> None:
    """Trained heads, biases, tokens and embeddings of adapters that go through PEFT's layer."""
    check(qwen2, make_adapter(tmp_path / "adapter", qwen2, **{"std": 0.02, **BESIDE[case]}), tmp_path / "out")


@pytest.mark.parametrize(
    "variant", ["Kasa", *(pytest.param(name, marks=pytest.mark.engine) for name in ("Velora", "Monteclora"))]
)
def test_variants_of_lora(qwen2: Path, tmp_path: Path, variant: str) -> None:
    from peft.tuners.lora import config

    option = {f"{variant.lower()}_config": getattr(config, f"{variant}Config")()}
    check(qwen2, make_adapter(tmp_path / "adapter", qwen2, std=0.02, **option), tmp_path / "out")


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.engine)])
def test_control_an_init_that_changed_the_base(qwen2: Path, tmp_path: Path, init: str) -> None:
    """Taken for a plain LoRA, the merge is wrong, and the check sees it."""
    adapter = make_adapter(tmp_path / "adapter", qwen2, init_lora_weights=init)
    config = json.loads((adapter / "adapter_config.json").read_text())
    oracle = merged_by_peft(qwen2, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    got = stored(export_merged(qwen2, [adapter], tmp_path / "out"))
    assert max(worst_ulp(got, {name: oracle[name] for name in got}).values()) > 1


def reconfigured(adapter: Path, **changes: Any) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return adapter


@pytest.fixture(scope="module")
def unchanged(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("unchanged") / "adapter", qwen2)


@pytest.fixture
def plain(unchanged: Path, tmp_path: Path) -> Path:
    """An adapter whose files a test may change."""
    return Path(shutil.copytree(unchanged, tmp_path / "adapter"))


@pytest.mark.parametrize("init", ["corda", "loftq", "pissa_niter_4", "lora_ga"])
def test_inits_that_cannot_be_repeated(qwen2: Path, plain: Path, init: str) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights '{init}' changed the base") as caught:
        fold(qwen2, [reconfigured(plain, init_lora_weights=init)])
    assert "path_initial_model_for_weight_conversion" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({"peft_type": method}, f"{method} cannot be merged") for method in peft_methods.UNMERGEABLE_METHODS),
        ({"peft_type": "NEXT_YEARS"}, "peft_type is 'NEXT_YEARS', expected one of ADALORA"),
        ({"init_lora_weights": "next-years"}, "init_lora_weights is 'next-years', expected true, false"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: activated LoRA"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config: Arrow chooses"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(qwen2: Path, plain: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said) as caught:
        fold(qwen2, [reconfigured(plain, **changes)])
    assert "peft" in caught.value.hint.lower()


def test_prompt_methods_as_peft_saves_them(qwen2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", qwen2, method="PROMPT_TUNING", num_virtual_tokens=4)
    with pytest.raises(AdapterError, match="PROMPT_TUNING cannot be merged: it has no weights"):
        fold(qwen2, [adapter])


def test_a_tensor_that_peft_does_not_know(qwen2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", qwen2, **given("LOHA"))
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.layers.0.self_attn.q_proj.hada_w9": torch.zeros(2)}, file)
    with pytest.raises(AdapterError, match="hada_w9: unknown to PEFT"):
        fold(qwen2, [adapter])
