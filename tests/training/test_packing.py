"""Rows in one sequence are what they are alone, in every family; where they cannot be, they are not packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora2serve.data.samples import Sample
from lora2serve.training.packing import keep_apart
from tests.support.families import FAMILIES, HANDFUL, make_family
from tests.support.runs import Told, fit, logged, make_chat_model, recipe_file

pytestmark = pytest.mark.engine

BY_MASKS = {"gpt_oss", "falcon", "opt", "mpt"}  # which transformers' own code does not look at positions for
RUN_ON = {  # along the whole sequence, without the kernels that stop at a border; ALiBi counts on
    "qwen3_5_text",
    "qwen3_next",
    "lfm2",
    "granitemoehybrid",
    "falcon_h1",
    "jamba",
    "bamba",
    "nemotron_h",
    "mamba",
    "mamba2",
    "rwkv",
    "recurrent_gemma",
    "bloom",
}
KINDS = [
    *(pytest.param(kind, {}, marks=() if kind in HANDFUL else pytest.mark.slow) for kind in FAMILIES),
    pytest.param("falcon", {"alibi": True}, marks=pytest.mark.slow, id="falcon-alibi"),
]


def documents(*lengths: int, seed: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(ids, ids, False) for ids in drawn]


def learned(model: Any, rows: Sequence[Sample], *, lengths: Sequence[int] | None) -> torch.Tensor:
    """The log-probability of each token but the first of a row, as TRL's trainer takes it: packed, or row by row."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if lengths is None:
        return torch.cat([learned(model, [row], lengths=[len(row.input_ids)]) for row in rows])
    joined = [token for row in rows for token in row.input_ids]
    example = {"input_ids": joined, "labels": joined, "seq_lengths": list(lengths)}
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([example])
    with torch.no_grad():
        output = model(**inputs, fused_lm_head=True)
    log_probabilities: torch.Tensor = output.log_probs[output.label_mask]
    return log_probabilities


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_packed_as_alone_or_not_packed(kind: str, changes: dict[str, Any]) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = make_family(kind, **changes)
    told = Told()
    apart = keep_apart(model, documents(30, 9, 21), told)
    assert apart == (kind not in RUN_ON and not changes.get("alibi"))
    if not apart:
        (warning,) = told.warnings
        assert warning.endswith(f"would see each other in {type(model).__name__}: they are not packed")
        assert not model.base_model._forward_pre_hooks
        return
    assert told.warnings == []
    assert bool(model.base_model._forward_pre_hooks) == (kind in BY_MASKS)
    add_fused_lm_head(model, outputs=("log_probs",))
    rows = documents(17, 40, 3, 25, seed=6)  # others than those it was asked with
    lengths = [len(row.input_ids) for row in rows]
    alone = learned(model, rows, lengths=None)
    assert torch.allclose(learned(model, rows, lengths=lengths), alone, atol=2e-5)
    run_together = learned(model, rows, lengths=[sum(lengths)])
    borders = torch.tensor(lengths[:-1]).cumsum(0) - 1  # of the first tokens, which nothing stands before alone
    keep = torch.ones(len(run_together), dtype=torch.bool)
    keep[borders] = False
    assert not torch.allclose(run_together[keep], alone, atol=1e-2), "the control: one document"


def test_a_run_that_cannot_pack_says_so_and_trains_all_the_same(tmp_path: Path, chats: dict[str, str]) -> None:
    base = make_chat_model(tmp_path / "base", kind="lfm2", layer_types=["conv", "full_attention"])
    options: dict[str, Any] = {"steps": 2, "batch_size": 4, "quantize": "none", "lora": {"targets": "qv-mlp"}}
    packed, told, _ = fit(recipe_file(tmp_path / "a", base, {**chats, "packing": True}, **options))
    plain, silent, _ = fit(recipe_file(tmp_path / "b", base, chats, **options))
    assert logged(packed) == logged(plain)
    assert [line for line in told.warnings if line not in silent.warnings] == [
        "data.packing: rows that share a sequence would see each other in Lfm2ForCausalLM: they are not packed"
    ]
