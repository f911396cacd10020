"""Every native family: a small model made by transformers, exported in one pass, in real llama.cpp and beside upstream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.converters.test_gguf_adapter import by_llama_cpp, nmse
from tests.support.tiny import make_model
from tests.support.upstream import convert, quantize

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "base"
SHAPE = {
    "vocab_size": 1536, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1,
}  # fmt: skip
ROPE3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256, "long_factor": [1.0 + n / 32 for n in range(32)], "short_factor": [1.0 + n / 64 for n in range(32)]}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 128}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"rope_parameters": ROPE3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2-moe": ("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64, "norm_topk_prob": True}),
    "gemma3": ("gemma3_text", {"vocab_size": 888, "head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {"attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "logits_scaling": 1.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 64}),
    "phi3": ("phi3", {"sliding_window": 512, "original_max_position_embeddings": 512}),
    "phi3-longrope": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 256, "rope_parameters": LONGROPE}),
    "ministral3": ("ministral3", {"head_dim": 64, "rope_parameters": YARN | {"mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1}}),
    "gpt-oss": ("gpt_oss", {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "rope_parameters": YARN}),
    "gemma2": ("gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
}  # fmt: skip
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
GPT2_CLASS = ("phi3", "phi3-longrope")  # upstream takes the byte-level tokenizer of Phi-4 only under this class's name
# What we say otherwise: the name that the user gave, and a rope base that upstream leaves to a default for Gemma 2.
OURS = {"general.name", "gemma2.rope.freq_base"}
CARD = (
    "---\nlicense: apache-2.0\ntags: [chat, test]\nlanguage: [en, de]\npipeline_tag: text-generation\n---\n# A model\n"
)


def model_of(models: dict[str, Path], family: str) -> Path:
    """Saved once; weights scaled up so that the logits are far from uniform."""
    if family not in models:
        kind, changes = FAMILIES[family]
        path = make_model(models["root"] / family, kind, **{**SHAPE, **changes})
        _sharpen(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(DEMO / name, path / name)
        (path / "README.md").write_text(CARD)
        if family == "gemma2":
            sentencepiece_tokenizer(path)
        if family in GPT2_CLASS:
            config = path / "tokenizer_config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
        models[family] = path
    return models[family]


def sentencepiece_tokenizer(path: Path) -> None:
    """A real SentencePiece model in place of the byte-level one, as Gemma 2 has."""
    from sentencepiece import SentencePieceTrainer

    from converters.gguf.tokenizer_check import SAMPLE_TEXT

    SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE_TEXT.splitlines() * 3), model_prefix=str(path / "tokenizer"), model_type="bpe",
        vocab_size=600, byte_fallback=True, split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    (path / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    template = path / "chat_template.jinja"  # which prints BOS, as Gemma's does
    template.write_text("{{ bos_token }}" + template.read_text())


def _sharpen(path: Path, by: float = 3) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = (tensor.float() * by).to(tensor.dtype)
        elif "norm" in name:
            tensors[name] = (tensor.float() + 0.2 * torch.randn_like(tensor.float())).to(tensor.dtype)
        else:
            tensors[name] = (0.1 * torch.randn_like(tensor.float())).to(tensor.dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def export(model: Path, out: Path, *words: str) -> Path:
    """The first file of an export, by the command line in this process: a new one would take seconds to start."""
    from lora2serve.cli import run

    assert run(["export", str(model), "-t", "gguf", "-o", str(out), *words]) == 0
    return min(file for file in out.rglob("*.gguf") if not file.name.startswith("mmproj-"))


def by_transformers(model: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: np.ndarray = loaded(torch.tensor([list(range(20, 90))])).logits[0].double().numpy()
    return logits


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family, its model, and the folder of its F16 and Q4_K_M files, which one command made."""
    model, out = model_of(models, request.param), tmp_path_factory.mktemp("exported")
    export(model, out, "-q", "F16", "-q", "Q4_K_M", "--match-reference")
    return request.param, model, out


@pytest.mark.parametrize("exported", FAMILIES, indirect=True)
def test_same_logits(exported: tuple[str, Path, Path]) -> None:
    """NMSE under 1e-5 at F16, under 1e-3 for mixtures of experts; the control, a shuffled answer, is far off."""
    family, model, out = exported
    expected = by_transformers(model)
    got = by_llama_cpp(next((out / "gguf-F16").glob("*.gguf")))
    assert expected.std() > 0.5, "far from uniform"
    assert nmse(got, expected) < (1e-3 if family in EXPERTS else 1e-5)
    assert nmse(got[::-1], expected) > 0.1


def upstream(model: Path, out: Path, kind: str, pre: str = "") -> Path:
    """llama.cpp's own converter, then its own quantizer out of the same library."""
    f16 = out / "upstream-f16.gguf"
    if not f16.exists():
        convert(model, f16, pre=pre)
    return f16 if kind == "F16" else quantize(f16, out / f"upstream-{kind}.gguf", kind)


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}
    return keys, tensors


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: (ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not key.startswith("lora2serve.") and key not in OURS
    }


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("exported", FAMILIES, indirect=True)
def test_byte_identical_to_upstream(exported: tuple[str, Path, Path], kind: str) -> None:
    """With ``--match-reference``: the same tensors, types and bytes, and the same metadata that the engine reads."""
    _, model, out = exported
    keys, tensors = read(next((out / f"gguf-{kind}").glob("*.gguf")))
    their_keys, theirs = read(upstream(model, out, kind, keys["tokenizer.ggml.pre"]))
    assert tensors.keys() == theirs.keys()
    assert {n: t for n, (t, _) in tensors.items()} == {n: t for n, (t, _) in theirs.items()}
    assert [name for name in tensors if tensors[name] != theirs[name]] == []
    assert differences(keys, their_keys) == {}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_default_roundings_of_exact_weights(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    """bfloat16 weights that F16 holds: the file is the same without ``--match-reference``."""
    model = model_of(models, family)
    files = [export(model, tmp_path / str(len(words)), "-q", "F16", *words) for words in ((), ("--match-reference",))]
    assert read(files[0]) == read(files[1])


def test_a_value_that_llama_cpp_cannot_express(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lora2serve.cli import run

    model = Path(shutil.copytree(model_of(models, "qwen3-moe"), tmp_path / "moe"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
    assert run(["export", str(model), "-t", "gguf", "-o", str(tmp_path / "out")]) == 1
    assert "norm_topk_prob is False" in capfd.readouterr().err
    config["architectures"] = ["NobodyKnowsForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    assert run(["export", str(model), "-t", "gguf", "-o", str(tmp_path / "out")]) == 1
    assert "LlamaForCausalLM" in capfd.readouterr().err
