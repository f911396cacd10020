"""Combinations of adapters against PEFT's own, on the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora2serve.adapters.combine import combine
from lora2serve.errors import MergeError
from lora2serve.weights.checkpoint import Checkpoint
from tests.support.folding import export_merged, stored, worst_ulp
from tests.support.tiny import load_model, make_adapter, make_model

WEIGHTS = (0.7, 0.4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("combine")
    base = make_model(root / "base", num_hidden_layers=1)
    return base, [make_adapter(root / f"a{seed}", base, seed=seed) for seed in (1, 2)]


RARE = [pytest.param(method, marks=pytest.mark.slow) for method in ("svd", "ties", "dare_ties", "dare_linear")]


@pytest.mark.parametrize("method", ["linear", "cat", "ties_svd", *RARE])
def test_equals_peft(pair: tuple[Path, list[Path]], tmp_path: Path, method: str) -> None:
    from peft import PeftModel

    base, adapters = pair
    adapted = PeftModel.from_pretrained(load_model(base), adapters[0], adapter_name="x")
    adapted.load_adapter(adapters[1], adapter_name="y")
    torch.manual_seed(0)
    given = {} if method in ("linear", "cat", "svd") else {"density": 0.5}
    adapted.add_weighted_adapter(["x", "y"], list(WEIGHTS), "z", combination_type=method, **given)
    adapted.set_adapter("z")
    oracle = adapted.merge_and_unload().state_dict()
    combined = combine(adapters, Checkpoint(base), method, WEIGHTS, 0.5, tmp_path / "combined")
    got = stored(export_merged(base, [combined], tmp_path / "out"))
    assert max(worst_ulp(got, {n: oracle[n] for n in got}).values()) <= 1


def test_ranks_that_differ(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    other = make_adapter(tmp_path / "other", base, r=8)
    with pytest.raises(MergeError, match="--combine linear") as caught:
        combine([adapters[0], other], Checkpoint(base), "linear", WEIGHTS, 0.5, tmp_path / "combined")
    assert "cat" in caught.value.hint


def test_embeddings(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """PEFT saves the whole embedding beside the LoRA on it, and would save the zeros it was combined on."""
    from peft import PeftModel

    base, _ = pair
    adapters = [
        make_adapter(tmp_path / f"a{seed}", base, seed=seed, target_modules=["q_proj", "embed_tokens"])
        for seed in (1, 2)
    ]
    adapted = PeftModel.from_pretrained(load_model(base), adapters[0], adapter_name="x")
    adapted.load_adapter(adapters[1], adapter_name="y")
    adapted.add_weighted_adapter(["x", "y"], list(WEIGHTS), "z", combination_type="cat")
    adapted.set_adapter("z")
    oracle = adapted.merge_and_unload().state_dict()
    combined = combine(adapters, Checkpoint(base), "cat", WEIGHTS, 0.5, tmp_path / "combined")
    got = stored(export_merged(base, [combined], tmp_path / "out"))
    assert max(worst_ulp(got, {n: oracle[n] for n in got}).values()) <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_dora": True}, "DoRA's magnitudes are lost"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa': its A and B alone"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight was trained in full"),
        ({"trainable_token_indices": [3, 4]}, "trained tokens are lost"),
        ({"method": "LOHA", "r": 4, "target_modules": ["q_proj"]}, "LOHA: PEFT combines LoRA only"),
    ],
)
def test_what_would_be_left_out(
    pair: tuple[Path, list[Path]], tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    base, adapters = pair
    other = make_adapter(tmp_path / "other", base, **given)
    with pytest.raises(MergeError, match=said) as caught:
        combine([adapters[0], other], Checkpoint(base), "linear", WEIGHTS, 0.5, tmp_path / "combined")
    assert "one after another" in caught.value.hint
