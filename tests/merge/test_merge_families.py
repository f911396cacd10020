"""The fold against PEFT's own merge, on one small model of every family that docs/models.md names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.folding import export_merged
from tests.support.tiny import make_adapter, make_model, merged_by_peft, model_state

pytestmark = pytest.mark.engine

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
LINEAR_ATTENTION = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "ministral3": {"head_dim": 16},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_next": {**EXPERTS, **LINEAR_ATTENTION},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "smollm3": {},
    "granite": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 64},
    "gpt_oss": {**EXPERTS, "head_dim": 16},
    "deepseek_v2": MLA,
    "stablelm": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "starcoder2": {},
    "cohere": {"tie_word_embeddings": True},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_peft(tmp_path: Path, kind: str) -> None:
    """Loaded again, every parameter is PEFT's, to the last bit but one; the control, the base itself, is not."""
    base = make_model(tmp_path / "base", kind, **FAMILIES[kind])
    targets: Any = ["in_proj"] if kind == "mamba2" else "all-linear"  # PEFT takes no LoRA on the others of Mamba
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=targets)
    export_merged(base, [adapter], tmp_path / "out")
    theirs = merged_by_peft(base, adapter)
    ours, before = model_state(tmp_path / "out"), model_state(base)
    changed = [name for name in theirs if not torch.equal(theirs[name], before[name])]
    assert changed
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2**-7, atol=1e-6, msg=name)
    assert any(not torch.allclose(before[name], ours[name], rtol=2**-7, atol=1e-6) for name in changed)
