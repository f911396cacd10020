"""Which inits take a part of the base into the adapter: PEFT's own code decides, not vLLM's checker, which takes some."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import LoftQConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from lora2serve.adapters.lint import lint
from lora2serve.config.lora_inits import changes_base
from tests.support.tiny import load_model, make_model

RANK, MODULE = 4, "model.layers.0.self_attn.q_proj"
TOKENS = [torch.arange(3 + step, 35 + step)[None] for step in range(3)]
INITS = (
    "gaussian", "orthogonal", "mica", "eva", "olora", "pissa", "pissa_niter_16", "corda", "loftq", "lora_ga",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("inits") / "base", dtype=torch.float32)


def base_weight_after(base: Path, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's weight before and after PEFT put the adapter on it."""
    model = load_model(base)
    before = model.get_submodule(MODULE).weight.detach().clone()
    more: dict[str, Any] = {
        "corda": {"corda_config": CordaConfig(corda_method="kpm")},
        "loftq": {"loftq_config": LoftQConfig(loftq_bits=4)},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
    }.get(init, {})
    config = LoraConfig(r=RANK, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init, **more)

    def run() -> None:
        for ids in TOKENS:
            model(ids)

    def train_step() -> None:
        for ids in TOKENS:
            model(ids, labels=ids).loss.backward()

    if init == "corda":
        with torch.no_grad():
            preprocess_corda(model, config, run_model=run)
    elif init == "lora_ga":
        preprocess_loraga(model, config, train_step)
    adapted = get_peft_model(model, config)
    if init == "eva":
        initialize_lora_eva_weights(adapted, batches(), show_progress_bar=False)
    return before, adapted.base_model.model.get_submodule(MODULE).get_base_layer().weight.detach()


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in TOKENS * 8]


@pytest.mark.parametrize("init", INITS)
def test_what_an_init_does_to_the_base(base: Path, init: str) -> None:
    """And what the lint says of it: an adapter over another base than the served one is never let pass."""
    if init == "loftq" and not (find_spec("scipy") and torch.cuda.is_available()):  # what it needs: PEFT's word instead
        assert "LoftQ will be used to quantize the backbone weights" in " ".join(str(LoraConfig.__doc__).split())
        assert changes_base(init)
        return
    before, after = base_weight_after(base, init)
    changed = not torch.equal(before, after)
    assert changes_base(init) == changed
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": init}
    assert [finding.rule for finding in lint(config, [], {})] == ["init"] * changed


def literals(annotation: Any) -> Iterator[str]:
    """Every text in a type such as ``bool | Literal[...]``."""
    for argument in get_args(annotation):
        if isinstance(argument, str):
            yield argument
        else:
            yield from literals(argument)


def test_every_init_of_peft_is_here() -> None:
    known = {
        "pissa_niter_16" if "niter" in name else name
        for name in literals(get_type_hints(LoraConfig)["init_lora_weights"])
    }
    assert known and known <= set(INITS), "PEFT has one that was never tried"
    assert {init for init in INITS if changes_base(init)} < set(INITS), "the control: some leave the base alone"
