"""The main job on a GPU: trained by CUDA kernels, folded without a GPU, compared on it with what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora2serve.artifacts.run import Run
from tests.conftest import lora2serve


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo's first steps, exported in two ways: a model this small leaves a GPU idle, so all would take minutes."""
    place = tmp_path_factory.mktemp("demo")
    words = ("--set", "train.steps=60", "--set", "parity.tokens=512", "--set", "parity.prompts=2")
    (name,) = lora2serve("train", "demo", *words, cwd=place).split()
    lora2serve("export", "--target", "vllm", "--target", "adapter", cwd=place)
    return Run(place / name)


def parity(run: Run, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """The rows of a report by the engines that are in this process's libraries."""
    engines = ("--engine", "transformers,peft", "--json")
    rows: list[dict[str, Any]] = json.loads(lora2serve("parity", run.path, *words, *engines, cwd=run.path, code=code))[
        "rows"
    ]
    return rows


def test_it_learned_on_the_gpu(run: Run) -> None:
    metrics = run.record.metrics
    assert (run.record.device, run.record.quantization.type) == ("cuda", "nf4")
    assert metrics.tuned.eval_loss < metrics.base.eval_loss - 0.3
    assert metrics.tuned_on_original.eval_loss < metrics.base.eval_loss - 0.3


def test_what_is_served_is_what_was_trained(run: Run) -> None:
    rows = {row["engine"]: row for row in parity(run)}
    assert sorted(rows) == ["peft", "transformers"]
    for row in rows.values():
        assert row["status"] == "met", row
        assert row["version"].endswith("cuda"), row["version"]


def test_updates_folded_too_strongly_are_red(run: Run, tmp_path: Path) -> None:
    """The control: every update at 1.5 of its size."""
    (export,) = lora2serve("export", run.path, "--target", "vllm", "--out", tmp_path, cwd=tmp_path).split()
    base = load_file(Path(run.record.base.path) / "model.safetensors")
    file = Path(export) / "model.safetensors"
    merged = load_file(file)
    for name, tensor in merged.items():
        delta = tensor.float() - base[name].float()
        merged[name] = (base[name].float() + 1.5 * delta).to(torch.bfloat16).contiguous()
    save_file(merged, file)
    (row,) = parity(run, export, code=3)
    assert row["status"] == "missed"
