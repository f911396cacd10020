"""Mixtures of experts, trained on 4 bits with a LoRA on each expert, in the engines that serve them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora2serve
from tests.support.llama_cpp_source import llama_cpp_dir
from tests.training.conftest import chats
from tests.training.test_experts import FOUR, trained

__all__ = ["chats"]  # a fixture

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

AMOUNT = {"tokens": 512, "window": 64, "long": 0, "prompts": 4, "new_tokens": 8}
ALL = {"num_experts_per_tok": 4}  # of four: no rounding turns the choice of a router with random weights
WIDE = {**ALL, "head_dim": 32}  # vLLM's attention for CPUs has none narrower
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": WIDE,
    "qwen3_moe": {**WIDE, "norm_topk_prob": True},  # as llama.cpp has it
    "gpt_oss": WIDE,
    "deepseek_v3": {  # as published: vLLM asks for what transformers takes for granted
        **ALL, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "rope_parameters": YARN,
    },
}  # fmt: skip
ROWS = [("gguf-F32", "llama.cpp"), ("vllm", "transformers"), ("vllm", "vllm")]


@pytest.mark.parametrize("kind", FOUR)
def test_served_as_trained(tmp_path: Path, chats: dict[str, str], kind: str) -> None:
    """Each gate is met, on the 4-bit base that PEFT computes with; folded onto the original one it is another model."""
    llama_cpp_dir()  # whose converter lays out DeepSeek
    run = trained(tmp_path, kind, chats, CHANGES[kind], steps=20)
    recipe = yaml.safe_load(run.recipe.read_text())
    run.recipe.write_text(yaml.safe_dump({**recipe, "parity": {**recipe["parity"], **AMOUNT}}))
    exports = {
        merge_base: lora2serve.export(
            run.path, targets=["vllm", "gguf"], quants="F32", merge_base=merge_base, out=tmp_path / merge_base
        )
        for merge_base in ("trained", "original")
    }
    paths = [export.path for export in exports["trained"]]
    report = lora2serve.parity(run.path, paths, engines=["vllm", "transformers", "llama.cpp"]).report
    assert sorted((row.export, row.engine) for row in report.rows) == ROWS
    for row in report.rows:
        assert row.status == "met", (row.export, row.engine, row.gates)
        figures = {check.name: check.value for check in row.gates[-1].checks}
        assert figures["mean_kl"] < 1e-6 and figures["retention"] < 1e-3, "and the adapter is seen in the answers"
    for mine, other in zip(exports["trained"], exports["original"], strict=True):
        (weights,) = [*mine.path.glob("*.gguf"), *mine.path.glob("*.safetensors")]
        weights.write_bytes((other.path / weights.name).read_bytes())
    broken = lora2serve.parity(run.path, paths, engines=["vllm", "llama.cpp"], allow="*").report  # but for the sums
    statuses = [{gate.name: gate.status for gate in row.gates} for row in broken.rows]
    assert [status["tensors"] for status in statuses] == ["missed"] * 2, "the control"
