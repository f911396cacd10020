"""What a recipe says of parity is checked before the training that it would be met after; what overrides may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lora2serve
from lora2serve.api.train_run import settings
from lora2serve.errors import DataError, RecipeError, UsageError

RECIPE = """
model: {path: base}
data: {train: missing.jsonl}
train: {quantize: none}
parity: {engines: [%s], require: [%s], thresholds: {%s}}
"""


def test_names_of_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lora2serve.yaml"
    path.write_text(RECIPE % ("vlm", "llama.cp", "Q4_K_N: {mean_kl: 0.1}, Q8_0: {mean_lk: 0.1, top1: 0.9}"))
    with pytest.raises(RecipeError) as caught:
        lora2serve.train(path)
    assert caught.value.message.splitlines() == [
        "parity.engines: unknown engine 'vlm' (did you mean 'vllm'?)",
        "parity.require: unknown engine 'llama.cp' (did you mean 'llama.cpp'?)",
        "parity.thresholds.Q4_K_N: unknown format (did you mean 'Q4_K_S'?)",
        "parity.thresholds.Q8_0.mean_lk: unknown figure (did you mean 'mean_kl'?)",
    ]
    assert "vllm" in caught.value.hint and "mean_kl" in caught.value.hint
    path.write_text(RECIPE % ("vllm", "llama.cpp", "Q4_K_M: {mean_kl: 0.1}"))
    with pytest.raises(DataError, match=r"missing\.jsonl"):  # the control: the next thing that is wrong
        lora2serve.train(path)
    assert not (tmp_path / "runs").exists()


def test_overrides_are_values_of_yaml() -> None:
    """Those of NumPy and paths, too; what is none is named, all at once."""
    values = {"train.steps": np.int64(3), "a": np.float32(0.5), "b": Path("x"), "c": [True, None], "d": "2"}
    assert settings(values) == ["train.steps=3", "a=0.5", 'b="x"', "c=[true, null]", 'd="2"']
    holding_itself: list[object] = []
    holding_itself.append(holding_itself)
    with pytest.raises(UsageError) as caught:
        lora2serve.train("demo", overrides={"train.lora.targets": {"q_proj"}, "b": object, "c": holding_itself})
    assert [line.partition(":")[0] for line in caught.value.message.splitlines()] == [
        "overrides['train.lora.targets']", "overrides['b']", "overrides['c']",
    ]  # fmt: skip
