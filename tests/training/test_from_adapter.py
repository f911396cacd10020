"""A training that goes on from an adapter: its weights, its settings, and a loss that begins where it ended."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora2serve
from lora2serve.config.recipe import LoraRecipe, TrainRecipe, load
from lora2serve.config.train_methods import TRAINABLE
from lora2serve.errors import Lora2ServeError, RecipeError, TrainError
from lora2serve.training.method_config import adapter_config
from lora2serve.training.model import add_adapter
from lora2serve.training.starting_adapter import NOT_SAVED, load_weights, other_base, settings_in_words, starting_from
from lora2serve.weights.checkpoint import content_hash
from tests.support.runs import logged, recipe_file
from tests.support.tiny import load_model, make_adapter, make_model
from tests.training.test_methods import OPTIONS

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path, chats: dict[str, str], method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    kind: dict[str, Any] = {"lora": {"rank": 4, "targets": "qv"}} if method == "lora" else {
        "method": method, "options": {"num_virtual_tokens": 4}
    }  # fmt: skip
    rate = 5e-3 if method == "lora" else 0.3
    first = lora2serve.train(recipe_file(tmp_path / "a", small, chats, steps=12, learning_rate=rate, **kind), name="a")
    again = recipe_file(tmp_path / "b", small, chats, steps=2, learning_rate=1e-9, from_adapter="a")
    second = lora2serve.train(again, name="b")
    before, after = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before), "the rate is next to nothing"
    assert first.record.metrics.tuned and second.record.metrics.tuned and first.record.metrics.base
    ended, went_on = first.record.metrics.tuned.eval_loss, second.record.metrics.tuned.eval_loss
    assert went_on == pytest.approx(ended, abs=1e-5)
    assert first.record.metrics.base.eval_loss - ended > 1e-3, "the control"
    assert logged(second)[1] < logged(first)[1]
    kept = load(second.recipe).train
    assert kept.from_adapter == str(first.adapter.resolve())
    record = second.record.from_adapter
    assert record and record.path == kept.from_adapter and not first.record.from_adapter
    assert record.sha256["adapter_model.safetensors"] == content_hash(first.adapter / "adapter_model.safetensors")
    assert kept.lora.rank == 4 if method == "lora" else kept.options["num_virtual_tokens"] == 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("from") / "base")


def test_its_settings_are_taken_over(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, r=6, lora_alpha=7, use_rslora=True, modules_to_save=["lm_head"])
    lora = starting_from(TrainRecipe(), adapter, ()).lora
    assert (lora.rank, lora.alpha, lora.rslora, lora.dora) == (6, 7, True, False)
    assert (set(lora.targets), lora.modules_to_save) == ({"q_proj", "v_proj", "down_proj"}, ("lm_head",))
    assert settings_in_words(TrainRecipe(lora=lora)) == "lora of rank 6, alpha 7, on down_proj, q_proj, v_proj"
    again = starting_from(TrainRecipe(lora=lora), adapter, [f"train.lora.{item.name}" for item in fields(lora)])
    assert again.lora == lora, "as its own run names them"
    with pytest.raises(TrainError) as caught:
        starting_from(TrainRecipe(lora=LoraRecipe(dora=True)), adapter, ["train.lora.rank", "train.lora.dora"])
    assert caught.value.message.splitlines() == [
        "train.lora.rank: 16, but the adapter of train.from_adapter has 6",
        "train.lora.dora: True, but the adapter of train.from_adapter has False",
    ], "a default that the recipe names, too, and none that it does not"
    assert caught.value.hint == "leave it out: train.from_adapter says it"
    ia3 = make_adapter(
        tmp_path / "ia3", base, method="IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    train = starting_from(TrainRecipe(), ia3, ())
    assert train.method == "ia3" and set(train.options) == {"target_modules", "feedforward_modules"}


def test_what_the_recipe_may_not_have_with_its_kind(base: Path, tmp_path: Path) -> None:
    """As where the recipe names the kind itself."""
    adapter = make_adapter(tmp_path / "loha", base, method="LOHA", r=4, target_modules=["q_proj"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}')
    file = recipe_file(tmp_path / "r", base, {"train": str(rows)}, from_adapter=str(adapter))
    with pytest.raises(RecipeError, match=r"train\.quantize: nf4, but loha computes with the weights of the base"):
        lora2serve.train(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, which no recipe says"),
        ({"bias": "all"}, "bias is 'all', which no recipe says"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which took a part of the base out"),
        ({"target_modules": ".*q_proj"}, "target_modules is '.*q_proj', expected a list of names"),
        ({"peft_type": "P_TUNING"}, "a training cannot go on from p_tuning"),
        ({"peft_type": "XLORA"}, "a training cannot go on from xlora"),
    ],
)
def test_what_no_training_can_go_on_from(base: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(TrainError) as caught:
        starting_from(TrainRecipe(), adapter, ())
    assert said in caught.value.message


def test_options_that_are_its_own(base: Path, tmp_path: Path) -> None:
    """One that the recipe names as it is, or as PEFT has it by default; and another one, which is refused."""
    adapter = make_adapter(tmp_path / "loha", base, method="LOHA", r=4, target_modules=["v_proj", "q_proj"])
    options = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    named = [f"train.options.{name}" for name in options]
    train = starting_from(TrainRecipe("loha", options, quantize="none"), adapter, named)
    assert set(train.options) == {"r", "target_modules"}
    assert starting_from(TrainRecipe("loha", {"target_modules": "qv"}), adapter, named).method == "loha"
    with pytest.raises(TrainError, match=r"^train.options.r: 8, but the adapter of train.from_adapter has 4$"):
        starting_from(TrainRecipe("loha", {"r": 8}), adapter, named)


KINDS = [
    pytest.param(method, marks=() if method in ("lora", "ia3", "vera") else pytest.mark.slow)
    for method in TRAINABLE
    if method not in NOT_SAVED
]


def adapted(base: Path, recipe: TrainRecipe) -> Any:
    """A model with a fresh adapter, as training makes it."""
    model = load_model(base)
    return add_adapter(model, adapter_config(model, recipe, base))


@pytest.mark.parametrize("method", KINDS)
def test_all_that_was_trained_is_in_the_file(base: Path, tmp_path: Path, method: str) -> None:
    """A fresh adapter with its weights gives the logits of the model that was trained."""
    torch.manual_seed(1)
    ids = torch.arange(5, 25)[None]
    trained = adapted(base, TrainRecipe(method, OPTIONS.get(method, {}), quantize="none")).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected, plain = trained(input_ids=ids).logits, load_model(base)(input_ids=ids).logits
    trained.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    fresh = adapted(base, starting_from(TrainRecipe(), tmp_path / "adapter", ()))
    load_weights(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert any(parameter.requires_grad for parameter in fresh.parameters())
    assert not torch.allclose(expected[:, -20:], plain, atol=1e-3), "the control: the base is another model"


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_a_base_of_another_shape(base: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    adapter, other = make_adapter(tmp_path / "adapter", base), make_model(tmp_path / "other", **changes)
    with pytest.raises(TrainError, match=r"train.from_adapter: .*adapter does not fit this base \(") as caught:
        load_weights(adapted(other, starting_from(TrainRecipe(), adapter, ())), adapter)
    assert caught.value.hint == "name its base in model.path"
    assert other_base(adapter, other, "other") and not other_base(adapter, base, "some/base")


BROKEN: list[tuple[dict[str, object], int | None, str]] = [
    ({}, 0, "no adapter_model.safetensors"),
    ({}, 500, "adapter_model.safetensors"),
    ({"target_modules": [1]}, None, "target_modules is [1], expected a list of names"),
]


@pytest.mark.parametrize(("changes", "left", "said"), BROKEN)
def test_a_damaged_adapter_is_refused_by_name(
    tmp_path: Path, small: Path, changes: dict[str, object], left: int | None, said: str
) -> None:
    """``left``: so many bytes of its weights."""
    adapter = make_adapter(tmp_path / "adapter", small)
    assert starting_from(TrainRecipe(), adapter, []).lora.rank == 4, "the control"
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    content = weights.read_bytes()
    if left is not None:
        weights.unlink() if left == 0 else weights.write_bytes(content[:left])
    with pytest.raises(Lora2ServeError) as caught:
        starting_from(TrainRecipe(), adapter, [])
    assert said in caught.value.message
