"""Each warning before the first step, and beside each the same recipe without the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora2serve.config.recipe import load
from lora2serve.data.samples import Sample
from lora2serve.system.hardware import nvidia_gpus
from lora2serve.training import advice
from tests.support.runs import fit, recipe_file

GOOD = Sample([1, 2, 3], [-100, 2, 3], cut=False)
LONG = Sample([1, 2, 3], [-100, 2, 3], cut=True)
EMPTY = Sample([1, 2, 3], [-100, -100, -100], cut=True)
FINE: dict[str, Any] = {"rows": [GOOD] * 300, "held_out": True, "checkpointing": True}


def warned(tmp_path: Path, train: dict[str, Any], **seen: Any) -> list[str]:
    recipe = load(recipe_file(tmp_path, Path("m"), {"train": "t", "eval": "e"}, **train))
    given = {**FINE, **seen}
    return advice.warnings(recipe, given["rows"], given["held_out"], given["checkpointing"])


FAULTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rate": 9e-5}, {}, "learning rate 9e-05 is low for LoRA"),
    ({}, {"checkpointing": False}, "no gradient checkpointing with a 4-bit base"),
    ({}, {"held_out": False}, "no eval data"),
    (
        {},
        {"rows": [GOOD] * 150},
        "150 rows will be memorized: set train.lora.dropout: 0.05 and train.early_stopping: 3",
    ),
    ({"lora": {"rank": 65}}, {}, "rank 65 is large"),
    ({"lora": {"modules_to_save": ["lm_head"]}}, {}, "lm_head trained in full: vLLM, llama.cpp and Ollama refuse"),
    ({"lora": {"modules_to_save": ["model.embed_tokens"]}}, {}, "model.embed_tokens trained in full"),
    ({}, {"rows": [GOOD] * 298 + [LONG] * 2}, "2 of 300 rows are longer than 128 tokens and were cut"),
    ({}, {"rows": [GOOD] * 299 + [EMPTY]}, "1 of 300 rows have no token to learn from"),
]


@pytest.mark.parametrize(("train", "seen", "said"), FAULTS, ids=[said for _, _, said in FAULTS])
def test_each_fault_is_told(tmp_path: Path, train: dict[str, Any], seen: dict[str, Any], said: str) -> None:
    assert any(said in line for line in warned(tmp_path, train, **seen))


CONTROLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"learning_rate": 1e-4}, {}),
    ({"quantize": "none"}, {"checkpointing": False}),
    ({"early_stopping": 3, "lora": {"dropout": 0.05}}, {"rows": [GOOD] * 150}),
    ({"lora": {"rank": 64}}, {}),
    ({"lora": {"modules_to_save": ["norm"]}}, {}),
]


@pytest.mark.parametrize(("train", "seen"), CONTROLS)
def test_nothing_is_told_without_a_fault(tmp_path: Path, train: dict[str, Any], seen: dict[str, Any]) -> None:
    assert warned(tmp_path, train, **seen) == []


SERVABLE: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"rslora": True}, ""),
    ({"init": "pissa"}, ""),  # saved as a plain LoRA for the true base
    ({"dora": True}, "because DoRA rescales each row of the base"),
    ({"modules_to_save": ["lm_head"]}, "because trained in full: lm_head"),
]


@pytest.mark.parametrize(("lora", "because"), SERVABLE, ids=str)
def test_multi_lora(tmp_path: Path, small: Path, chats: dict[str, str], lora: dict[str, Any], because: str) -> None:
    """A real training says before its first step whether vLLM will serve the adapter beside others."""
    _, told, _ = fit(recipe_file(tmp_path, small, chats, steps=1, quantize="none", lora={"rank": 4, **lora}))
    said = [line for line in told.warnings if "not be servable as multi-LoRA" in line]
    assert len(said) == bool(because)
    assert not said or (because in said[0] and "--target vllm merges it" in said[0])


def test_multi_lora_asks_the_class_of_the_base(tmp_path: Path) -> None:
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": {"c_attn"}}
    assert "GPT2LMHeadModel takes no LoRA" in advice.multi_lora(plain, {"architectures": ["GPT2LMHeadModel"]})
    assert advice.multi_lora(plain, {"architectures": ["LlamaForCausalLM"]}) == ""
    assert advice.multi_lora({**plain, "init_lora_weights": "pissa"}, {}) == "", "the export rewrites it"


def test_a_gpu_that_would_stand_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path, chats: dict[str, str]
) -> None:
    """The driver's tool finds a GPU, torch does not: a fine-tune of days on the CPU is not begun unsaid."""
    import torch

    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA A10G, 23028 MiB, 570.1'\n")
    tool.chmod(0o755)
    nvidia_gpus.cache_clear()
    assert advice.idle_gpu() == "", "the control: no GPU here"
    nvidia_gpus.cache_clear()
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    _, told, _ = fit(recipe_file(tmp_path, small, chats, steps=1, quantize="none"))
    assert any("is built for CPUs: training takes the CPU (pip install" in line for line in told.warnings)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cannot use it: training takes the CPU (nvidia-smi shows the driver's version" in advice.idle_gpu()
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    nvidia_gpus.cache_clear()
    assert advice.idle_gpu() == "", "the control: the tool without a GPU"
    nvidia_gpus.cache_clear()
