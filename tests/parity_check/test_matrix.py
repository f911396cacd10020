"""Forty sound exports, of all kinds of models and types: every gate is met. docs/parity.md lists them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.parity_check.comparator import check
from lora2serve.parity_check.comparisons import of_exports
from lora2serve.parity_check.trained_model import of_parts
from lora2serve.progress import Silent
from tests.conftest import lora2serve
from tests.support.runs import DEMO
from tests.support.tiny import SHAPE, load_model, make_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

WIDE: Mapping[str, Any] = {  # as the demo's base: rows of 256 values, which is a block of the coarser types
    **SHAPE, "vocab_size": 1536, "hidden_size": 256, "intermediate_size": 512, "bos_token_id": None, "eos_token_id": 0,
    "num_hidden_layers": 3, "rms_norm_eps": 1e-6,
}  # fmt: skip
EXPERTS: Mapping[str, Any] = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
CAPS: Mapping[str, Any] = {
    "head_dim": 64, "sliding_window": 32, "query_pre_attn_scalar": 64, "tie_word_embeddings": True,
}  # fmt: skip
ATTENTION = ("q_proj", "v_proj", "o_proj")
Exports = tuple[tuple[str, str], ...]
STEPS = 100


@dataclass(frozen=True)
class Sound:
    """A model, its adapter, and the exports (target, type) of both."""

    exports: Exports
    kind: str = "llama"
    changes: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    modules: tuple[str, ...] = (*ATTENTION, "down_proj")
    lora: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[torch.nn.Module], None] = lambda model: None
    allow: tuple[str, ...] = ()
    learns: bool = False  # computes otherwise than a Llama
    often: bool = False  # in the usual suite


def different(model: torch.nn.Module) -> None:
    """Experts that were all taken from one dense model, each gone a way of its own."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.add_(torch.randn_like(parameter) * parameter.std() / 10)


SOUND: Mapping[str, Sound] = {
    "vllm": Sound((("vllm", ""), ("vllm", "fp8"), ("vllm", "int8"), ("vllm", "w8a16"), ("vllm", "w4a16"), ("adapter", ""))),
    "gguf": Sound(tuple(("gguf", quant) for quant in (
        "F32", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_S", "Q3_K_M", "Q2_K"))),
    "hosts": Sound((("ollama", "Q4_K_M"), ("lmstudio", "Q8_0"), ("gguf-adapter", ""))),
    "float16": Sound((("vllm", ""), ("gguf", "F16")), dtype=torch.float16, often=True),
    "tied": Sound((("vllm", ""), ("gguf", "Q8_0"), ("vllm", "w8a16")), "qwen3", {"head_dim": 64, "tie_word_embeddings": True}, learns=True),
    "qwen3": Sound((("gguf", "BF16"),), "qwen3", {"head_dim": 64}, learns=True),
    "caps": Sound((("vllm", ""), ("vllm", "w8a16")), "gemma2", CAPS, learns=True),
    "gemma3": Sound((("vllm", ""), ("vllm", "fp8")), "gemma3_text", CAPS, learns=True),
    "experts": Sound((("vllm", ""), ("gguf", "Q8_0")), "mixtral", EXPERTS, modules=ATTENTION, change=different),
    "upcycled": Sound((("vllm", ""), ("gguf", "Q8_0")), "mixtral", EXPERTS, modules=ATTENTION),
    "padded": Sound((("vllm", ""), ("gguf", "Q8_0"), ("ollama", "Q6_K")), changes={"vocab_size": 1600}),
    "fused": Sound((("vllm", ""), ("vllm", "fp8-block")), "phi3", modules=("qkv_proj", "down_proj")),
    "dora": Sound((("vllm", ""),), lora={"use_dora": True, "use_rslora": True}),
    "own sampling": Sound((("vllm", ""), ("ollama", "Q8_0")), allow=("generation_config.json:*", "Modelfile:num_predict")),
}  # fmt: skip


def make_base(path: Path, sound: Sound, seed: int) -> Path:
    """The demo's base as a model of another kind: heads of random weights are flat, so that any rounding turns an answer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sound.kind, **{**WIDE, **sound.changes}))
    with torch.no_grad():
        take_over(model, load_file(DEMO / "base" / "model.safetensors"))
        sound.change(model)
    if sound.learns:
        learn(model)
    model.config.dtype = sound.dtype
    model.to(sound.dtype).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / "base" / name, path / name)
    return path


def take_over(model: torch.nn.Module, dense: Mapping[str, torch.Tensor]) -> None:
    """The weights of a Llama: rows of a larger vocabulary stay, projections are fused, every expert is its MLP."""
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, parameter in model.named_parameters():
        stored = name.replace(".experts.", ".") + ("" if name.endswith(".weight") else ".weight")
        parts = [
            dense.get(stored.replace(whole, part))
            for whole, names in fused.items()
            if whole in stored
            for part in names
        ]
        values = [part for part in parts or [dense.get(stored)] if part is not None]
        if values:
            joined = torch.cat(values).to(parameter.dtype)
            target = parameter if joined.dim() == 1 else parameter[..., : joined.shape[0], :]
            target.copy_(joined.expand_as(target))


def make_trained_adapter(path: Path, base: Path, sound: Sound, seed: int) -> Path:
    """One of random values makes a model worse, which any rounding then makes better or worse still."""
    from peft import PeftModel

    make_adapter(path, base, seed=seed, std=0.01, target_modules=list(sound.modules), **sound.lora)
    adapted = PeftModel.from_pretrained(load_model(base), path, is_trainable=True)
    learn(adapted)
    adapted.save_pretrained(path)
    return path


def learn(model: Any) -> None:
    """The demo's text and chats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    texts = [json.loads(line)["text"] for line in (DEMO / "general.jsonl").open()]
    for line in (DEMO / "train.jsonl").open():
        texts.append(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    for _ in range(STEPS):
        batch = tokenizer(
            [texts[index] for index in torch.randint(len(texts), (8,)).tolist()],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def set_own_sampling(export: Path) -> None:
    """What a user may set for the answers of an export."""
    if (export / "Modelfile").is_file():
        (export / "Modelfile").write_text((export / "Modelfile").read_text() + "PARAMETER num_predict 20\n")
        return
    file = export / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": True, "temperature": 0.6}))


def test_there_are_forty() -> None:
    assert sum(len(sound.exports) for sound in SOUND.values()) >= 40
    assert sum(len(sound.exports) for sound in SOUND.values() if sound.often) == 2


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=[] if sound.often and not seed else [pytest.mark.slow])
        for name, sound in SOUND.items()
        for seed in range(3)
    ],
)
def test_sound_exports_are_met(tmp_path: Path, name: str, seed: int) -> None:
    """That damaged ones are red, the tests of each gate show."""
    sound = SOUND[name]
    base = make_base(tmp_path / "base", sound, seed)
    adapter = make_trained_adapter(tmp_path / "adapter", base, sound, seed)
    for target in dict.fromkeys(target for target, _ in sound.exports):
        quants = [quant for each, quant in sound.exports if each == target]
        for plain in {not quant for quant in quants}:
            words = [word for quant in quants if quant and not plain for word in ("-q", quant)]
            lora2serve("export", adapter, "--base", base, "-t", target, *words, "-o", tmp_path / "out", cwd=tmp_path)
    exports = sorted(path for path in (tmp_path / "out").iterdir() if (path / "lora2serve.json").is_file())
    assert len(exports) == len(sound.exports)
    if sound.allow:
        for export in exports:
            set_own_sampling(export)
    origin = of_parts("matrix", base, (adapter,), tmp_path / "parity")
    engines = ("transformers", "peft", "llama.cpp")
    tokens = 2048 if sound.often else 8192
    settings = replace(origin.settings, tokens=tokens, window=128, prompts=4, engines=engines, allow=sound.allow)
    origin = replace(origin, settings=settings, rows=DEMO / "train.jsonl")  # text of a kind that the model knows
    for row in check(origin, of_exports(origin, exports), progress=Silent()).rows:
        missed = [check for gate in row.gates for check in gate.checks if check.met is False]
        assert [gate.status for gate in row.gates] == ["met"] * 4, "\n".join(map(str, (row.export, row.gate, *missed)))
