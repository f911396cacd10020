"""Each rule against vLLM's own checker: what we refuse it refuses, what we let pass it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora2serve.adapters import vllm_support
from lora2serve.adapters.lint import HEAD_LIMIT, RANKS, lint, next_rank
from lora2serve.weights.tensors import TensorSpec
from scripts import vllm_lora_classes

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 320}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

REFUSED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "layer-replication": {"layer_replication": [[0, 2], [1, 2]]},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "qalora": {"use_qalora": True},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "rank": {"rank_pattern": {"q_proj": 1024}},
}
TAKEN: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 512}, "alpha_pattern": {"v_proj": 3}},
    {"modules_to_save": ["score"]},
    *({"init_lora_weights": init} for init in (True, False, "gaussian", "EVA", "orthogonal", "mica")),
]
INITS = ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
WITHOUT_ALPHA = {key: value for key, value in PLAIN.items() if key != "lora_alpha"}


def engine_says(config: dict[str, Any]) -> str:
    """The engine's complaint, or an empty string."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    try:
        PEFTHelper.from_dict(dict(config)).validate_legal(LoRAConfig(max_lora_rank=512))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("rule", REFUSED)
def test_refused(rule: str) -> None:
    assert [finding.rule for finding in lint({**PLAIN, **REFUSED[rule]}, [], LLAMA)] == [rule]


@pytest.mark.engine
@pytest.mark.parametrize("rule", REFUSED)
def test_refused_by_both(rule: str) -> None:
    assert engine_says({**PLAIN, **REFUSED[rule]})


@pytest.mark.parametrize("init", INITS)
def test_init(init: str) -> None:
    config = {**PLAIN, "init_lora_weights": init}
    (finding,) = lint(config, [], LLAMA)
    assert finding.rule == "init"
    assert finding.fix == ("export" if init in ("pissa", "olora") else "convert")


@pytest.mark.engine
@pytest.mark.parametrize("init", INITS)
def test_init_is_refused_by_both(init: str) -> None:
    refused = engine_says({**PLAIN, "init_lora_weights": init})
    assert refused or init == "lora_ga"  # vLLM 0.32 takes it, and answers from another base


@pytest.mark.parametrize("changes", TAKEN, ids=str)
def test_taken(changes: dict[str, Any]) -> None:
    assert lint({**PLAIN, **changes}, [], LLAMA) == []


@pytest.mark.engine
@pytest.mark.parametrize("changes", TAKEN, ids=str)
def test_taken_by_both(changes: dict[str, Any]) -> None:
    assert engine_says({**PLAIN, **changes}) == ""


def test_missing_fields() -> None:
    assert [finding.rule for finding in lint(WITHOUT_ALPHA, [], LLAMA)] == ["fields"]


@pytest.mark.engine
def test_missing_fields_are_refused_by_both() -> None:
    assert "lora_alpha" in engine_says(WITHOUT_ALPHA)


def test_several_at_once() -> None:
    config = {**PLAIN, **REFUSED["dora"], **REFUSED["bias"]}
    assert {finding.rule for finding in lint(config, [], LLAMA)} == {"dora", "bias"}


def loaded(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    """What vLLM says of these tensors when it loads them, or an empty string."""
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    try:
        LoRAModel.from_lora_tensors(1, tensors, PEFTHelper.from_dict(config), device="cpu", model_vocab_size=320)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


SCORE, CLASSIFIER = "base_model.model.score", "base_model.model.classifier"
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"
LOADED: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("", {f"{SCORE}.weight": (2, 64), f"{SCORE}.bias": (2,)}),
    ("modules-to-save", {f"{SCORE}.weight": (2, 64), f"{CLASSIFIER}.weight": (2, 64)}),
    ("modules-to-save", {f"{SCORE}.bias": (2,)}),
    ("", {EMBEDDING: (8, 320)}),
    ("embedding-vocabulary", {EMBEDDING: (8, 321)}),
]


WITH_HEADS = {**PLAIN, "modules_to_save": ["score", "classifier"]}


@pytest.mark.parametrize(("rule", "shapes"), LOADED)
def test_what_cannot_be_loaded(rule: str, shapes: dict[str, tuple[int, ...]]) -> None:
    found = lint(WITH_HEADS, [TensorSpec(name, shape, "F32") for name, shape in shapes.items()], LLAMA)
    assert {one.rule for one in found} == ({rule} if rule else set())


@pytest.mark.engine
@pytest.mark.parametrize(("rule", "shapes"), LOADED)
def test_loaded_as_the_lint_says(rule: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert bool(loaded(WITH_HEADS, shapes)) == bool(rule)


NAMES = [
    (A, True),
    (A.replace("lora_A", "lora_B"), True),
    (A.replace("lora_A.weight", "lora_embedding_A"), True),
    (A.replace("lora_A.weight", "lora_magnitude_vector"), False),
    (A.replace("lora_A.weight", "weight"), False),
    (A.replace("lora_A.weight", "bias"), False),
    (A.replace("lora_A", "lora_B").replace("weight", "bias"), False),
    ("base_model.model.score.weight", True),
    ("base_model.model.classifier.bias", True),
    ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", False),
]


@pytest.mark.engine
@pytest.mark.parametrize(("name", "taken"), NAMES)
def test_names_that_vllm_takes(name: str, taken: bool) -> None:
    """What it imports for that takes seconds."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    if taken:
        parse_fine_tuned_lora_name(name)
    else:
        with pytest.raises(ValueError, match="unsupported LoRA weight"):
            parse_fine_tuned_lora_name(name)


@pytest.mark.parametrize(("name", "taken"), NAMES)
def test_tensor_names(name: str, taken: bool) -> None:
    specs = [TensorSpec(name, (8, 320) if "embedding" in name else (8, 64), "F32")]
    if name == f"{CLASSIFIER}.bias":  # alone it has a good name and cannot be loaded: see LOADED
        specs.append(TensorSpec(f"{CLASSIFIER}.weight", (8, 64), "F32"))
    assert (lint(PLAIN, specs, LLAMA) == []) == taken


@pytest.mark.engine
def test_ranks_are_the_engines() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == RANKS


def test_next_rank() -> None:
    assert [next_rank(rank) for rank in (1, 2, 8, 9, 512, 513)] == [1, 8, 8, 16, 512, None]


def test_embedding_of_another_size() -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    assert lint(PLAIN, [TensorSpec(name, (8, 320), "F32")], LLAMA) == []
    (finding,) = lint(PLAIN, [TensorSpec(name, (8, 321), "F32")], LLAMA)
    assert finding.rule == "embedding-vocabulary" and "321" in finding.message


def test_head() -> None:
    head = {**PLAIN, "target_modules": ["lm_head"]}
    assert lint(head, [], LLAMA) == []
    assert [f.rule for f in lint(head, [], {**LLAMA, "vocab_size": 262144})] == ["head-vocabulary"]
    assert lint(PLAIN, [], {**LLAMA, "vocab_size": 262144}) == []
    models = vllm_lora_classes.models_dir()
    assert models is not None
    source = (models.parents[1] / "lora" / "layers" / "logits_processor.py").read_text(encoding="utf-8")
    assert f"> {HEAD_LIMIT}" in source, "the limit is the engine's"
    gemma = {"architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144}
    assert [f.rule for f in lint(head, [], gemma)] == ["target-modules"]


def test_model_without_lora() -> None:
    (finding,) = lint(PLAIN, [], {"architectures": ["GPT2LMHeadModel"]})
    assert finding.rule == "model" and "GPT2LMHeadModel" in finding.message


@pytest.mark.engine
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM", "MixtralForCausalLM"])
def test_reader_agrees_with_the_class(name: str) -> None:
    """The source reader says what the imported class says."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    cls = ModelRegistry._try_load_model_cls(name)
    read = vllm_support.lora_class(name)
    assert read is not None and read.lora == supports_lora(cls)
    if read.lora:
        assert set(read.embeddings) == set(cls.embedding_modules)


@pytest.mark.engine
def test_the_table_is_that_of_the_installed_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the script writes it as it stands."""
    root = vllm_lora_classes.models_dir()
    assert root is not None
    classes = vllm_lora_classes.table(root)
    assert json.loads(vllm_support.TABLE.read_text())["classes"] == classes
    assert {name: read.lora for name, read in vllm_support.lora_classes().items()} == {
        name: modules is not None for name, modules in classes.items()
    }
    assert vllm_support.lora_class("NoSuch") is None
    assert {read.lora for read in vllm_support.lora_classes().values()} == {True, False}, "the control"
    monkeypatch.setattr(vllm_lora_classes, "TABLE", tmp_path / "table.json")
    vllm_lora_classes.main()
    assert (tmp_path / "table.json").read_bytes() == vllm_support.TABLE.read_bytes()
