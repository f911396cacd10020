"""Adapters whose names are not those on disk: multimodal prefixes, fused experts, older PEFT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora2serve.errors import AdapterError, CheckpointError, MergeError
from lora2serve.merge.binding import Binder
from lora2serve.weights.bnb.fake_quantized import FakeQuantized, Quantization
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized
from tests.support.folding import export_merged, stored, worst_ulp
from tests.support.tiny import SHAPE, load_model, make_adapter, make_model, merged_by_peft, model_state

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make_multimodal(path: Path, kind: str, text: dict[str, Any], **config: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    parsed = transformers.AutoConfig.for_model(kind, text_config={**SHAPE, **text}, **config)
    model = transformers.AutoModelForImageTextToText.from_config(parsed).to(torch.bfloat16)
    model.save_pretrained(path)
    return path


def text_adapter(path: Path, base: Path) -> Path:
    """LoRA on the language model of a multimodal checkpoint, by the names that transformers gives it today."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    with patch.object(PeftModel, "create_or_update_model_card", lambda *_: None):  # it takes the longest
        adapted.save_pretrained(path)
    return path


MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 1},
        {"vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "mistral3": (
        {"model_type": "mistral", "head_dim": 16, "num_hidden_layers": 1},
        {"vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16}},
    ),
    "qwen2_5_vl": (
        {
            "model_type": "qwen2_5_vl_text",
            "num_hidden_layers": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
            }
        },
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        "qwen2_5_vl",
        pytest.param("gemma3", marks=pytest.mark.engine),
        pytest.param("mistral3", marks=pytest.mark.slow),
    ],
)
def test_multimodal(tmp_path: Path, kind: str) -> None:
    """The language model is folded under whatever name the file has for it; the rest passes through untouched."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    text, config = MULTIMODAL[kind]
    base = make_multimodal(tmp_path / "base", kind, text, **config)
    adapter = text_adapter(tmp_path / "adapter", base)
    out = export_merged(base, [adapter], tmp_path / "out")
    before, after = stored(base), stored(out)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 * text.get("num_hidden_layers", 2)
    assert all("q_proj" in name or "down_proj" in name for name in changed)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    oracle = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    got = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    assert max(worst_ulp({n: t.bfloat16() for n, t in got.items()}, oracle).values()) <= 1


LINEAR = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "in_channels": 3,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
}  # fmt: skip
LLAMA4_VISION = {
    "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5
}  # fmt: skip
QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4, "hc_lowrank": 8, "layer_types": ["linear_attention", "indexed_attention"],
}  # fmt: skip
MLLAMA_VISION = {
    "attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 1, "intermediate_layers_indices": [0],
    "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip
TWO_CLASSES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "qwen3_5": (LINEAR, {"vision_config": QWEN_VISION}, []),
    "qwen3_5_moe": (LINEAR | EXPERTS, {"vision_config": QWEN_VISION}, ["experts.gate_up_proj", "experts.down_proj"]),
    "qwen4_exp": (
        LINEAR | EXPERTS | QWEN4,
        {"vision_config": QWEN_VISION},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "llama4": (
        {
            "head_dim": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 1,
        },
        {"vision_config": {**VISION, **LLAMA4_VISION}},
        ["experts.gate_up_proj"],
    ),
    "mllama": ({"cross_attention_layers": [1]}, {"vision_config": {**VISION, **MLLAMA_VISION}}, []),
    "gemma3": (*MULTIMODAL["gemma3"], []),  # the control: one class for both
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "experts": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "loha": {"method": "LOHA", "target_modules": ["q_proj", "v_proj"], "r": 4},
}
# Of each method a class, experts as they lie in Qwen3.5 and in Llama 4; of each class a method, and of each method another
# class, in make test; the rest weekly.
OFTEN = {
    "qwen3_5": (), "qwen3_5_moe": ("experts",), "qwen4_exp": ("lora",), "llama4": ("experts",), "mllama": ("head",),
    "gemma3": ("loha",),
}  # fmt: skip
IN_TEST = {"qwen3_5": ("head",), "qwen3_5_moe": ("lora",), "llama4": ("loha",), "mllama": ("lora",)}


def how_often(kind: str, method: str) -> list[pytest.MarkDecorator]:
    if method in OFTEN[kind]:
        return []
    return [pytest.mark.engine if method in IN_TEST.get(kind, ()) else pytest.mark.slow]


TRAINED = [
    pytest.param(kind, method, marks=how_often(kind, method))
    for kind, (_, _, experts) in TWO_CLASSES.items()
    for method in METHODS
    if (experts or method != "experts") and (kind, method) != ("gemma3", "head")  # which is tied
]


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A base of one of TWO_CLASSES, which nobody writes to."""
    root = tmp_path_factory.mktemp("two-classes")

    @cache
    def make(kind: str) -> Path:
        text, config, _ = TWO_CLASSES[kind]
        return make_multimodal(root / kind, kind, text, **config)

    return make


@pytest.mark.parametrize(("kind", "method"), TRAINED)
def test_trained_as_a_language_model(
    two_classes: Callable[[str], Path], tmp_path: Path, kind: str, method: str
) -> None:
    """What ``AutoModelForCausalLM`` makes of a multimodal base has other names than the base's own class and its file."""
    experts, base = TWO_CLASSES[kind][2], two_classes(kind)
    options = METHODS[method] | ({"target_parameters": experts} if method == "experts" else {})
    if kind == "gemma3":
        options["exclude_modules"] = ".*vision.*"
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    out = export_merged(base, [adapter], tmp_path / "out")
    got, oracle = model_state(out), merged_by_peft(base, adapter)
    before = model_state(base)
    changed = [name for name in oracle if not torch.equal(got[name], before[name])]
    assert any(part in name for name in changed for part in ("q_proj", "v_proj"))
    assert method != "experts" or any("experts" in name for name in changed)
    assert method != "head" or "lm_head.weight" in changed
    assert max(worst_ulp({n: t.bfloat16() for n, t in got.items()}, oracle, before).values()) <= 1
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        json.loads((base / "config.json").read_text())["architectures"][0]
    ]


def test_every_type_with_two_classes_is_here() -> None:
    """Emu 3 has a test of its own: its second class loads nothing."""
    from transformers.models.auto import modeling_auto as auto

    causal, multimodal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    differ = {kind for kind in causal.keys() & multimodal.keys() if causal[kind] != multimodal[kind]}
    assert differ == (TWO_CLASSES.keys() | {"emu3"}) - {"gemma3"}


def test_names_of_transformers_4(tmp_path: Path) -> None:
    """Gemma 3 was ``language_model.model.layers`` when many adapters were trained."""
    text, config = MULTIMODAL["gemma3"]
    base = make_multimodal(tmp_path / "base", "gemma3", text, **config)
    adapter = text_adapter(tmp_path / "adapter", base)
    expected = stored(export_merged(base, [adapter], tmp_path / "now"))
    file = adapter / "adapter_model.safetensors"
    renamed = {
        name.replace("model.model.language_model.", "model.language_model.model."): t
        for name, t in load_file(file).items()
    }
    assert renamed.keys() != load_file(file).keys()
    save_file(renamed, file)
    got = stored(export_merged(base, [adapter], tmp_path / "then"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("kind", "experts"), [("mixtral", "block_sparse_moe.experts"), ("qwen3_moe", "mlp.experts")])
def test_one_adapter_per_expert(tmp_path: Path, kind: str, experts: str) -> None:
    """Adapters of transformers 4 have one A and B for each expert, under the names on disk."""
    extra = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    }[kind]
    base = make_model(tmp_path / "base", kind, **extra)
    down = {"mixtral": "w2", "qwen3_moe": "down_proj"}[kind]
    weights, tensors = stored(base), {}
    torch.manual_seed(0)
    for expert in range(4):
        name = f"model.layers.1.{experts}.{expert}.{down}"
        out, into = weights[f"{name}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, into) * 0.05
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 4) * 0.05
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [down]})
    )
    got = stored(export_merged(base, [adapter], tmp_path / "out"))
    for name, tensor in got.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weights[name].float()
        if f"{key}.lora_A.weight" in tensors:
            expected = expected + 2 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        assert torch.equal(tensor, expected.bfloat16()), name


FUSED: dict[str, tuple[str, dict[str, Any], bool]] = {  # and whether gate and up come in turns
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 64}, True),
    "llama4_text": ("llama4_text", {"head_dim": 16, "num_local_experts": 3, "intermediate_size_mlp": 64, "num_experts_per_tok": 1}, False),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**LINEAR, **EXPERTS, "num_experts": 3, "layer_types": ["full_attention"]}, False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "style"),
    [
        pytest.param(kind, style, marks=[] if kind == "gpt_oss" or style == "halves" else [pytest.mark.slow])
        for kind in FUSED
        for style in ("halves", "whole", "lists")
    ],
)
def test_an_adapter_per_expert_of_fused_ones(tmp_path: Path, kind: str, style: str) -> None:
    """Taken apart for training, stored as one: each expert's product lies in its own place, and in no other."""
    name, config, interleaved = FUSED[kind]
    base = make_model(tmp_path / "base", name, num_hidden_layers=len(config.get("layer_types", [1])), **config)
    loaded, tensors = load_model(base), {}
    state = {name: tensor.bfloat16() for name, tensor in loaded.state_dict().items()}
    save_file(state, base / "model.safetensors", {"format": "pt"})  # as published: saved, Qwen's are taken apart
    owner = next(n for n in state if n.endswith("experts.gate_up_proj")).removesuffix(".gate_up_proj")
    module = loaded.get_submodule(owner)
    fused = {"gate_up_proj": module.gate_up_proj.detach().clone(), "down_proj": module.down_proj.detach().clone()}
    transposed = kind != "qwen3_5_moe_text"
    torch.manual_seed(0)
    for expert in (0, 2):
        for part, whole in fused.items():
            own = whole[expert].T if transposed else whole[expert]  # (out, in), a view
            half = own.shape[0] // 2
            gate, up = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
            pieces = (
                {part: slice(None)} if style != "halves" or part == "down_proj" else {"gate_proj": gate, "up_proj": up}
            )
            for piece, outputs in pieces.items():
                a, b = torch.randn(4, own.shape[1]) * 0.05, torch.randn(len(own[outputs]), 4) * 0.05
                path = f"{owner}.{piece}s.{expert}" if style == "lists" else f"{owner}.{expert}.{piece}"
                tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
                own[outputs] += 2 * b @ a
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    got = load_model(export_merged(base, [adapter], tmp_path / "out")).get_submodule(owner)
    for part, whole in fused.items():
        assert torch.equal(getattr(got, part), whole.bfloat16().float()), part
        assert torch.equal(getattr(got, part)[1], getattr(module, part)[1]), "the control: an expert without a LoRA"


def test_keys_of_older_peft(tmp_path: Path) -> None:
    """``modules_to_save.`` in the key, the adapter's name in it, ``.weight`` behind the magnitude."""
    base = make_model(tmp_path / "base", num_hidden_layers=1)
    adapter = make_adapter(tmp_path / "adapter", base, use_dora=True, modules_to_save=["lm_head"])
    oracle = merged_by_peft(base, adapter)
    file = adapter / "adapter_model.safetensors"
    old = {}
    renamed = {
        "lora_magnitude_vector": "lora_magnitude_vector.default.weight",
        "lm_head.weight": "lm_head.modules_to_save.weight",
        "lora_A.weight": "lora_A.default.weight",
    }
    for name, tensor in load_file(file).items():
        for new, before in renamed.items():
            name = name.replace(new, before)  # noqa: PLW2901
        old[name] = tensor
    save_file(old, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    kept = {
        k: v
        for k, v in config.items()
        if k in ("peft_type", "r", "lora_alpha", "target_modules", "use_dora", "modules_to_save")
    }
    (adapter / "adapter_config.json").write_text(json.dumps(kept))
    got = stored(export_merged(base, [adapter], tmp_path / "out"))
    assert max(worst_ulp(got, oracle).values()) <= 1


def test_configs_of_both_generations(tmp_path: Path) -> None:
    """``torch_dtype`` stays ``torch_dtype`` and ``dtype`` stays ``dtype``."""
    base = make_model(tmp_path / "base", num_hidden_layers=1)
    assert "dtype" in json.loads((export_merged(base, [], tmp_path / "five") / "config.json").read_text())
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    four = json.loads((export_merged(base, [], tmp_path / "four", "F16") / "config.json").read_text())
    assert four["torch_dtype"] == "float16"
    assert "dtype" not in four
    assert load_model(tmp_path / "four").dtype == torch.float32


WRAPPED = {
    "torch.compile": "base_model.model._orig_mod.",
    "torch.compile of PEFT": "_orig_mod.base_model.model.",
    "fsdp": "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.",
    "fsdp of layers": "base_model.model.",
    "ddp": "module.base_model.model.",
    "ddp inside": "base_model.model.module.",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama, which nobody writes to."""
    return make_model(tmp_path_factory.mktemp("plain") / "base")


INSIDE: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "rank_pattern": {}},
    "loha": {"method": "LOHA", "r": 4},
}
OF_LOHA = ("fsdp of layers", "ddp inside")  # the others' are weekly


@pytest.fixture(scope="module")
def unwrapped(
    request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter that nobody writes to, and what it makes of the base."""
    place = tmp_path_factory.mktemp("unwrapped")
    adapter = make_adapter(place / "adapter", plain, target_modules=["q_proj", "down_proj"], **INSIDE[request.param])
    return adapter, stored(export_merged(plain, [adapter], place / "out"))


@pytest.mark.parametrize(
    ("unwrapped", "wrapper"),
    [
        *(("rslora", wrapper) for wrapper in WRAPPED),
        *(pytest.param("loha", name, marks=() if name in OF_LOHA else pytest.mark.slow) for name in WRAPPED),
    ],
    indirect=["unwrapped"],
)
def test_wrapped_keys(
    plain: Path, unwrapped: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, wrapper: str
) -> None:
    """What training was wrapped in is no part of a name; the same adapter without it gives the same bytes."""
    base, (alone, expected) = plain, unwrapped
    adapter = Path(shutil.copytree(alone, tmp_path / "adapter"))
    file, inside = adapter / "adapter_model.safetensors", "_fsdp_wrapped_module._checkpoint_wrapped_module."
    tensors = {
        name.replace("base_model.model.", WRAPPED[wrapper], 1): tensor for name, tensor in load_file(file).items()
    }
    if wrapper == "fsdp of layers":
        tensors = {re.sub(r"(layers\.\d+\.)", rf"\1{inside}", name): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = [f"model.layers.{n}.{inside}self_attn.q_proj" for n in (0, 1)] + ["_orig_mod.down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": names}))
    got = stored(export_merged(base, [adapter], tmp_path / "out"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(not torch.equal(got[name], tensor) for name, tensor in stored(base).items())


def test_a_key_with_and_without_a_wrapper(plain: Path, tmp_path: Path) -> None:
    """The control: two tensors of one name are refused."""
    base = plain
    file = make_adapter(tmp_path / "adapter", base) / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, f"_orig_mod.{name}": tensors[name].clone()}, file)
    with pytest.raises(AdapterError, match="with a wrapper's prefix and without"):
        export_merged(base, [file.parent], tmp_path / "out")


def classifier(path: Path, kind: str, **config: Any) -> Path:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    parsed = AutoConfig.for_model(kind, **{**SHAPE, "num_labels": 3, **config})
    AutoModelForSequenceClassification.from_config(parsed).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma", "qwen2", "qwen3", "mistral"))]
)
def test_a_classifier(tmp_path: Path, kind: str) -> None:
    """Folded with its head onto a base that has one; the reason is said where the base is a language model."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification as Classifier

    config = {"num_hidden_layers": 1, **({"head_dim": 16} if kind in ("qwen3", "gemma") else {})}
    base = classifier(tmp_path / "base", kind, **config)
    net = Classifier.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(net, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapter = tmp_path / "adapter"
    with patch.object(PeftModel, "create_or_update_model_card", lambda *_: None):
        adapted.save_pretrained(adapter)
    out = export_merged(base, [adapter], tmp_path / "out")
    model = Classifier.from_pretrained(base, dtype=torch.float32)
    oracle = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    got = Classifier.from_pretrained(out, dtype=torch.float32).state_dict()
    assert max(worst_ulp({n: t.bfloat16() for n, t in got.items()}, oracle, stored(base) | got).values()) <= 1
    assert not torch.equal(got["score.weight"], stored(base)["score.weight"].float())
    with pytest.raises(MergeError, match=r"score\.weight: the adapter brings a head for classes") as caught:
        export_merged(make_model(tmp_path / "other", kind, **config), [adapter], tmp_path / "out2")
    assert "--base names the classifier" in caught.value.hint
    assert "1 of 2 changes" in caught.value.message, "the others fit"


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("model.layers.7.self_attn.q_proj", "the adapter changes layer 7, the base has 2"),
        ("model.layers.1.self_attn.qproj", "the base has no such weight \\(did you mean"),
        ("v_head", "brings a head for classes or values"),
    ],
)
def test_each_mismatch_has_its_reason(plain: Path, tmp_path: Path, parameter: str, reason: str) -> None:
    base = plain
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    old = "model.layers.1.self_attn.q_proj"
    save_file({name.replace(old, parameter): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(MergeError, match=rf"1 of 2 changes.*\n.*{re.escape(parameter)}\.weight: .*{reason}"):
        export_merged(base, [adapter], tmp_path / "out")


def test_a_class_that_loads_nothing(tmp_path: Path) -> None:
    """Emu 3 as a language model: transformers itself finds no weight for it in a published file."""
    vq = {"codebook_size": 16, "embed_dim": 8, "latent_dim": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 2}  # fmt: skip
    tokens = {
        "<|extra_200|>": 7,
        "<image>": 8,
        "<|extra_0|>": 9,
        **{f"<|visual token {i:06d}|>": 10 + i for i in range(16)},
    }
    base = make_multimodal(tmp_path / "base", "emu3", {"num_hidden_layers": 1}, vq_config=vq, vocabulary_map=tokens)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(
        MergeError, match="no stored weight into it as Emu3ForCausalLM: it was trained on random values"
    ):
        export_merged(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("qwen3_5", "llama4", "gemma3") else [pytest.mark.engine])
        for kind in TWO_CLASSES
    ],
)
def test_round_trip_through_4_bits(two_classes: Callable[[str], Path], plain: Path, tmp_path: Path, kind: str) -> None:
    """What training quantized is named by the model that it loaded; the same bits whatever the file calls it."""
    base = two_classes(kind)
    loaded = load_model(base)
    modules = [
        name
        for name, module in loaded.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(("q_proj", "down_proj")) and "vision" not in name
    ]
    checkpoint = Checkpoint(base)
    how = Quantization(modules, 64, True, "F32", on_gpu=False)
    names = Binder(list(checkpoint.specs()), checkpoint.config)
    seen = FakeQuantized(Dequantized(checkpoint), how, names)
    shutil.copy(plain / "config.json", tmp_path)
    for module in modules:
        value = loaded.get_submodule(module).weight.detach().contiguous()
        save_file({f"{module}.weight": value.bfloat16()}, tmp_path / "model.safetensors")
        alone = FakeQuantized(Dequantized(Checkpoint(tmp_path)), Quantization([module], 64, True, "F32", on_gpu=False))
        stored_name = names.stored_name(f"{module}.weight")
        assert stored_name in checkpoint
        got = seen.read(stored_name).values
        assert torch.equal(got, alone.read(f"{module}.weight").values)
        assert not torch.equal(got, value), "the control: it was quantized"
        codes = [each.quantized(f"{module}.weight")[0] for each in (seen, alone)]
        assert torch.equal(*codes)
    with pytest.raises(CheckpointError, match="quantized in training, but not in this base"):
        FakeQuantized(Dequantized(checkpoint), Quantization(["model.no.such"], 64, True, "F32", on_gpu=False), names)
