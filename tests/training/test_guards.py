"""Each warning before the first step, and beside each the same recipe without the fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora2serve.config.recipe import load
from lora2serve.data.samples import Sample
from lora2serve.system.hardware import nvidia_gpus
from lora2serve.training import advice
from tests.support.runs import fit, recipe_file


def good(count: int) -> list[Sample]:
    """Rows without a fault."""
    return [Sample([1, 2, 3], [-100, 2, 3], cut=False, row=row) for row in range(count)]


LONG = [Sample([1, 2, 3], [-100, 2, 3], cut=True, row=row) for row in (298, 299)]
EMPTY = Sample([1, 2, 3], [-100, -100, -100], cut=True, row=299)
FINE: dict[str, Any] = {"rows": good(300), "held_out": True}


def warned(tmp_path: Path, train: dict[str, Any], **seen: Any) -> list[str]:
    recipe = load(recipe_file(tmp_path, Path("m"), {"train": "t", "eval": "e"}, **train))
    given = {**FINE, **seen}
    return advice.warnings(recipe, given["rows"], given["held_out"])


FAULTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rate": 9e-5}, {}, "learning rate 9e-05 is low for LoRA"),
    ({"gradient_checkpointing": False}, {}, "no gradient checkpointing with a 4-bit base"),
    ({}, {"held_out": False}, "no eval data"),
    (
        {"steps": 60},
        {"rows": good(150)},
        "150 rows will be memorized: set train.lora.dropout: 0.05, train.early_stopping: 3, train.eval_steps: 6",
    ),
    ({"steps": 60, "eval_steps": 5}, {"rows": good(150)}, "set train.lora.dropout: 0.05, train.early_stopping: 3"),
    ({"steps": 60, "early_stopping": 3}, {"rows": good(150)}, "memorized: set train.lora.dropout: 0.05"),
    ({"steps": 60}, {"rows": good(150), "held_out": False}, "memorized: set train.lora.dropout: 0.05"),
    ({"steps": 4}, {"rows": good(150)}, "memorized: set train.lora.dropout: 0.05"),
    (
        {"steps": 60, "early_stopping": 5, "eval_steps": 20},
        {},
        "train.early_stopping: 5 cannot stop a run of 60 steps that is evaluated 3 times: set train.eval_steps: 4",
    ),
    (
        {"steps": 4, "early_stopping": 3},
        {},
        "train.early_stopping: 3 cannot stop a run of 4 steps that is evaluated 1 time: leave it out",
    ),
    ({"lora": {"rank": 65}}, {}, "rank 65 is large"),
    ({"lora": {"modules_to_save": ["lm_head"]}}, {}, "lm_head trained in full: vLLM, llama.cpp and Ollama refuse"),
    ({"lora": {"modules_to_save": ["model.embed_tokens"]}}, {}, "model.embed_tokens trained in full"),
    ({}, {"rows": [*good(298), *LONG]}, "2 of 300 rows are longer than 128 tokens and were cut"),
    ({}, {"rows": [*good(299), EMPTY]}, "1 of 300 rows have no token to learn from"),
    ({}, {"rows": [*good(300), EMPTY]}, "1 of 300 rows have answers that are not learned"),
]


@pytest.mark.parametrize(("train", "seen", "said"), FAULTS, ids=[said for _, _, said in FAULTS])
def test_each_fault_is_told(tmp_path: Path, train: dict[str, Any], seen: dict[str, Any], said: str) -> None:
    assert any(line.endswith(said) or said in line for line in warned(tmp_path, train, **seen))


def test_no_advice_that_would_be_refused_or_do_nothing(tmp_path: Path) -> None:
    """Early stopping needs held-out rows and several evaluations; what `init` writes has one an epoch, and 3 epochs."""
    for train, seen in (({"steps": 60}, {"held_out": False}), ({"steps": 4}, {})):
        assert not any("early_stopping" in line for line in warned(tmp_path, train, rows=good(150), **seen))
    (line,) = warned(tmp_path, {"steps": None, "epochs": 3, "batch_size": 8}, rows=good(150))
    wanted = line.partition("set ")[2].split(", ")
    advised = {key.removeprefix("train."): float(value) for key, value in (word.split(": ") for word in wanted)}
    assert (advised["lora.dropout"], advised["early_stopping"]) == (0.05, 3)
    total = 3 * 19
    assert total // advised["eval_steps"] > 3 + 1, "two evaluations at least may be better, and three then worse"


CONTROLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"learning_rate": 1e-4}, {}),
    ({"quantize": "none"}, {"checkpointing": False}),
    ({"early_stopping": 3, "steps": 60, "eval_steps": 6, "lora": {"dropout": 0.05}}, {"rows": good(150)}),
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


@pytest.mark.engine
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


@pytest.mark.engine
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


def test_answers_that_are_compared_have_warnings_of_their_own(tmp_path: Path) -> None:
    """Of pairs neither dropout nor the rate of a LoRA; of labels both kinds, which count about alike."""
    pairs = [Sample([1, 2], [-100, 2], cut=False, row=row, right=side) for row in range(300) for side in (True, False)]
    assert warned(tmp_path, {"objective": "dpo", "learning_rate": 1e-5}, rows=pairs) == []
    (high,) = warned(tmp_path, {"objective": "dpo", "learning_rate": 1e-3}, rows=pairs)
    assert high.startswith("learning rate 0.001 is high for dpo: 5e-6 to 5e-5 is usual")
    (few,) = warned(tmp_path, {"objective": "dpo", "learning_rate": 1e-5, "steps": 60}, rows=pairs[:100])
    assert few == "50 rows will be memorized: set train.early_stopping: 3, train.eval_steps: 6"
    kto: dict[str, Any] = {"objective": "kto", "learning_rate": 1e-5}
    (uneven,) = warned(tmp_path, kto, rows=pairs[:-150:2] + pairs[1:300:2])
    assert uneven.endswith("so that both count about alike") and "train.preference.desirable_weight: 0.67 to" in uneven
    weighed = {**kto, "preference": {"desirable_weight": 0.8}}
    assert warned(tmp_path, weighed, rows=pairs[:-150:2] + pairs[1:300:2]) == [], "the control"
    few_wrong = pairs[::2] + pairs[1:4:2]
    (skewed,) = warned(tmp_path, kto, rows=few_wrong)
    for weight in re.findall(r"desirable_weight: (\S+) to (\S+),", skewed)[0]:
        followed = {**kto, "preference": {"desirable_weight": float(weight)}}
        assert warned(tmp_path, followed, rows=few_wrong) == [], "what it names is enough"
    (alike,) = warned(tmp_path, kto, rows=pairs[::2])
    assert alike == "all 300 answers are labeled true: kto learns from both kinds"
