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

from lora2serve.parity_check.comparator import check
from lora2serve.parity_check.comparisons import of_exports
from lora2serve.parity_check.trained_model import of_parts
from lora2serve.progress import Silent
from tests.conftest import lora2serve
from tests.support.runs import DEMO
from tests.support.tiny import SHAPE, make_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

WIDE: Mapping[str, Any] = {  # rows of 256 values, which is a block of the coarser types
    **SHAPE, "vocab_size": 1536, "hidden_size": 256, "intermediate_size": 512, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
EXPERTS: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
CAPS: Mapping[str, Any] = {
    "head_dim": 64, "sliding_window": 32, "query_pre_attn_scalar": 64, "tie_word_embeddings": True,
}  # fmt: skip
ATTENTION = ("q_proj", "v_proj", "o_proj")
Exports = tuple[tuple[str, str], ...]


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
    often: bool = False  # in the usual suite


def upcycled(model: torch.nn.Module) -> None:
    """Every expert is the first one, as a mixture of experts begins that is made of a dense model."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.copy_(parameter[:1].expand_as(parameter).clone())


SOUND: Mapping[str, Sound] = {
    "vllm": Sound((("vllm", ""), ("vllm", "fp8"), ("vllm", "int8"), ("vllm", "w8a16"), ("vllm", "w4a16"), ("adapter", ""))),
    "gguf": Sound(tuple(("gguf", quant) for quant in (
        "F32", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_S", "Q3_K_M", "Q2_K"))),
    "hosts": Sound((("ollama", "Q4_K_M"), ("lmstudio", "Q8_0"), ("gguf-adapter", ""))),
    "float16": Sound((("vllm", ""), ("gguf", "F16")), dtype=torch.float16, often=True),
    "tied": Sound((("vllm", ""), ("gguf", "Q8_0"), ("vllm", "w8a16")), "qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3": Sound((("gguf", "BF16"),), "qwen3", {"head_dim": 64}),
    "caps": Sound((("vllm", ""), ("vllm", "w8a16")), "gemma2", CAPS),
    "gemma3": Sound((("vllm", ""), ("vllm", "fp8")), "gemma3_text", CAPS),
    "experts": Sound((("vllm", ""), ("gguf", "Q8_0")), "mixtral", EXPERTS, modules=ATTENTION),
    "upcycled": Sound(
        (("vllm", ""), ("gguf", "Q8_0")), "mixtral", EXPERTS, modules=ATTENTION, change=upcycled
    ),
    "padded": Sound((("vllm", ""), ("gguf", "Q8_0"), ("ollama", "Q6_K")), changes={"vocab_size": 1600}),
    "fused": Sound((("vllm", ""), ("vllm", "fp8-block")), "phi3", modules=("qkv_proj", "down_proj")),
    "dora": Sound((("vllm", ""),), lora={"use_dora": True, "use_rslora": True}),
    "own sampling": Sound((("vllm", ""), ("ollama", "Q8_0")), allow=("generation_config.json:*", "Modelfile:num_predict")),
}  # fmt: skip


def make_base(path: Path, sound: Sound, seed: int) -> Path:
    """A random model whose weights are large enough for every token to matter to the next."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sound.kind, **{**WIDE, **sound.changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        sound.change(model)
    model.config.dtype = sound.dtype
    model.to(sound.dtype).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / "base" / name, path / name)
    return path


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
    adapter = make_adapter(
        tmp_path / "adapter", base, seed=seed, std=0.05, target_modules=list(sound.modules), **sound.lora
    )
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
    settings = replace(origin.settings, tokens=2048, window=128, prompts=4, engines=engines, allow=sound.allow)
    origin = replace(origin, settings=settings)
    for row in check(origin, of_exports(origin, exports), progress=Silent()).rows:
        missed = [check for gate in row.gates for check in gate.checks if check.met is False]
        assert [gate.status for gate in row.gates] == ["met"] * 4, (row.export, missed, row.gate)
