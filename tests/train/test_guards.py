"""Each warning before the first step, and beside each the same recipe without the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora2serve.recipe import load
from lora2serve.train import guards
from lora2serve.train.data import Tokens
from tests.train.runs import recipe_file

GOOD = Tokens([1, 2, 3], [-100, 2, 3], cut=False)
LONG = Tokens([1, 2, 3], [-100, 2, 3], cut=True)
EMPTY = Tokens([1, 2, 3], [-100, -100, -100], cut=True)
FINE: dict[str, Any] = {"rows": [GOOD] * 300, "held_out": True, "checkpointing": True}


def warned(tmp_path: Path, train: dict[str, Any], **seen: Any) -> list[str]:
    recipe = load(recipe_file(tmp_path, Path("m"), {"train": "t", "eval": "e"}, **train))
    given = {**FINE, **seen}
    return guards.warnings(recipe, given["rows"], given["held_out"], given["checkpointing"])


FAULTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rate": 9e-5}, {}, "learning rate 9e-05 is low for LoRA"),
    ({}, {"checkpointing": False}, "no gradient checkpointing with a 4-bit base"),
    ({}, {"held_out": False}, "no eval data"),
    (
        {},
        {"rows": [GOOD] * 150},
        "150 rows will be memorised: set train.lora.dropout: 0.05 and train.early_stopping: 3",
    ),
    ({"lora": {"rank": 65}}, {}, "rank 65 is large"),
    ({"lora": {"modules_to_save": ["lm_head"]}}, {}, "lm_head trained in full: vLLM and llama.cpp refuse"),
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
