"""``data.new_tokens``: rows of their own in embedding and head, trained beside a LoRA, saved alone, exported whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import TrainRecipe
from lora2serve.data import data_sets
from lora2serve.data.base_template import base_template
from lora2serve.data.new_tokens import NO_TOKENS, add_new_tokens
from lora2serve.data.tokenization import tokenize_all
from lora2serve.data.tokenizer import encode, load_tokenizer
from lora2serve.errors import AdapterError, DataError, RecipeError, TrainError
from lora2serve.progress import Silent
from lora2serve.training import eval_loss
from lora2serve.training.model import Device
from lora2serve.training.new_rows import grow, refuse_common_base
from lora2serve.training.weightless import check_adapter
from tests.support.runs import DEMO, fit, logged, make_chat_model, recipe_file, rows, write_jsonl
from tests.support.tiny import load_model, make_model

pytestmark = pytest.mark.engine

TOKENS = ["<call>", "<done>"]
FIRST = 887  # tokens of the demo's tokenizer
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": FIRST},
    "llama-tied": {"vocab_size": FIRST, "tie_word_embeddings": True},
    "qwen3-padded": {"head_dim": 16},
    "gemma2-tied": {"vocab_size": FIRST, "head_dim": 16, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Conversations whose answers stand between the new tokens."""
    folder, files = tmp_path_factory.mktemp("calls"), {}
    for name, count in (("train", 24), ("eval", 8)):
        chats = rows(f"{name}.jsonl", count)
        for chat in chats:
            answer = chat["messages"][-1]
            answer["content"] = f"{TOKENS[0]}{answer['content']}{TOKENS[1]}"
        files[name] = str(write_jsonl(folder / f"{name}.jsonl", chats))
    return {**files, "new_tokens": TOKENS}


def base_of(path: Path, kind: str) -> Path:
    return make_chat_model(path, kind=kind.partition("-")[0], **KINDS[kind])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, calls: dict[str, Any]) -> Run:
    """Of 4 bits, on a base whose embedding has to grow."""
    folder = tmp_path_factory.mktemp("trained")
    file = recipe_file(folder, base_of(folder / "base", "llama"), calls, steps=8, learning_rate=1e-2)
    amount = {"tokens": 256, "window": 64, "long": 0, "prompts": 2, "new_tokens": 8}
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "parity": amount}))
    return fit(file)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_is_saved_by_rows(tmp_path: Path, calls: dict[str, Any], kind: str) -> None:
    """PEFT on a base that has grown, from the saved rows alone, is what was trained."""
    from peft import PeftModel

    base = base_of(tmp_path / "base", kind)
    run, told, recipe = fit(recipe_file(tmp_path, base, calls, steps=16, learning_rate=1e-2, quantize="none"))
    losses, metrics = list(logged(run).values()), run.record.metrics
    assert sum(losses[-4:]) < sum(losses[:4]) and metrics.base and metrics.tuned
    assert metrics.tuned.eval_loss < metrics.base.eval_loss
    saved = load_file(run.adapter / "adapter_model.safetensors")
    tables = {name: value for name, value in saved.items() if ".lora_" not in name}
    assert {value.shape for value in tables.values()} == {(2, 64)}, "no table is saved whole"
    assert len(tables) == (1 if "tied" in kind else 2)
    assert all((value[0] - value[1]).abs().max() > 1e-4 for value in tables.values()), "both began as the mean"
    template = base_template(base, new_tokens=TOKENS)
    assert load_tokenizer(run.adapter).get_vocab() == template.tokenizer.get_vocab()
    assert template.new_tokens.ids == (FIRST, FIRST + 1) and template.new_tokens.added == tuple(TOKENS)
    held_out = tokenize_all(data_sets.read(calls["eval"]), template, recipe.data, Silent())
    assert all(set(template.new_tokens.ids) <= set(sample.input_ids) for sample in held_out)
    model = load_model(base)
    grow(model, FIRST + 2)
    again = PeftModel.from_pretrained(model, run.adapter).eval()
    loss = eval_loss.evaluate(again, held_out, template.tokenizer.pad_token_id, 4, Silent(), "").mean()
    assert loss.eval_loss == pytest.approx(metrics.tuned.eval_loss, abs=1e-5)
    assert any("does not have <call>, <done> (export --target vllm merges it)" in line for line in told.warnings)


def test_on_four_bits_it_goes_on_after_a_stop(tmp_path: Path, trained: Run, calls: dict[str, Any]) -> None:
    """To the last bit; and it is measured on the original base, which has to grow, too."""
    assert trained.record.metrics.tuned_on_original and trained.record.quantization
    broken = Run(Path(shutil.copytree(trained.path, tmp_path / "broken")))
    shutil.rmtree(broken.path / "checkpoints" / "checkpoint-8")
    broken.save(replace(broken.record, finished=False))
    again, _, _ = fit(trained.path.parent / "lora2serve.yaml", into=broken.path, resume=True)
    assert logged(again) == logged(trained)
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (trained, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    kept = load_file(next(again.path.glob("checkpoints/checkpoint-*")) / "adapter_model.safetensors")
    assert {name: value.shape for name, value in kept.items()} == {name: value.shape for name, value in first.items()}


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_every_export_holds_them(tmp_path: Path, trained: Run) -> None:
    """The tokenizer of the training, rows for its tokens, and every gate in transformers and llama.cpp."""
    options = {"dtype": "fp32", "quants": ["F32"], "out": tmp_path / "out"}
    exports = lora2serve.export(trained.path, targets=["vllm", "ollama"], **options)
    assert json.loads((exports[0].path / "config.json").read_text())["vocab_size"] == FIRST + 2
    assert encode(load_tokenizer(exports[0].path), f"a{TOKENS[1]}", special=False)[-1] == FIRST + 1
    engines = ["transformers", "llama.cpp"]
    result = lora2serve.parity(
        trained.path, [export.path for export in exports], engines=engines, report_dir=tmp_path / "parity"
    )
    assert [row.engine for row in result.report.rows] == engines and result.met, result.report.rows
    broken = Path(shutil.copytree(exports[0].path, tmp_path / "broken"))
    shutil.copy(DEMO / "base" / "tokenizer.json", broken / "tokenizer.json")
    again = lora2serve.parity(trained.path, broken, gate="settings", report_dir=tmp_path / "again")
    assert not again.met, "the control: without the training's tokenizer"


def test_no_target_beside_the_base_holds_them(tmp_path: Path, trained: Run) -> None:
    """It would be served with the tokenizer of the base; before the base is read."""
    for options in ({"targets": "adapter"}, {"targets": "adapter", "as_lora_rank": 8}, {"targets": "gguf-adapter"}):
        with pytest.raises(AdapterError, match=r"trained with new tokens \(<call>, <done>\), and (gguf-)?adapter"):
            lora2serve.export(trained.path, out=tmp_path / "out", **options)
    own = tmp_path / "own"
    shutil.copytree(trained.record.base.path, own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained.adapter / name, own / name)
    model = load_model(own)
    grow(model, FIRST + 2)
    model.save_pretrained(own)
    (export,) = lora2serve.export(
        trained.adapter, targets="adapter", as_lora_rank=64, base=own, out=tmp_path / "out", allow_base_mismatch=True
    )
    assert export.path.is_dir(), "the control: a base that has them"


def test_it_goes_on_from_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Run, calls: dict[str, Any]
) -> None:
    base = trained.record.base.path
    options = {"steps": 1, "learning_rate": 1e-9, "from_adapter": str(trained.adapter)}
    monkeypatch.chdir(tmp_path)
    again = lora2serve.train(recipe_file(tmp_path / "again", Path(base), calls, **options), name="again")
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (trained, again))
    assert all((first[name] - second[name]).abs().max() < 1e-6 for name in first)
    other = recipe_file(tmp_path / "other", Path(base), {**calls, "new_tokens": TOKENS[::-1]}, **options)
    with pytest.raises(TrainError, match=r"but the adapter of train.from_adapter has") as caught:
        lora2serve.train(other, name="no")
    assert caught.value.hint == 'set data.new_tokens: ["<call>", "<done>"]'


def test_what_a_tokenizer_has_already(tmp_path: Path) -> None:
    """Its row is trained from where it is, which is said; a word is found in others, and a row without it is told."""
    tokenizer = load_tokenizer(DEMO / "base")
    tokens = add_new_tokens(tokenizer, ["<|mark|>", "<|im_start|>", "mayor"])
    assert tokens.texts == ("<|im_start|>", "<|mark|>", "mayor") and tokens.known == 1
    assert list(tokens.notes()) == [
        f"data.new_tokens: '<|im_start|>' is token {tokens.ids[0]} of the base already: its row is trained, and none is "
        "added"
    ]
    missing, inside, hidden = tokens.warnings([])
    assert "in no training row" in missing and "'mayor': found inside longer words, too (put it in marks" in inside
    assert "'<|mark|>': by its form a control token, which llama.cpp and Ollama show in no answer (<mark> is" in hidden
    assert encode(tokenizer, "mayors", special=False)[0] == tokens.ids[2], "the control"


def test_what_a_tokenizer_splits() -> None:
    """A piece of its vocabulary that no text gives, and one that a longer token swallows: both at once."""
    tokenizer = load_tokenizer(DEMO / "base")
    with pytest.raises(DataError) as caught:
        add_new_tokens(tokenizer, ["\u0120the", "<|x|>"])
    assert caught.value.message.count("\n") == 0 and "'\u0120the' is token" in caught.value.message
    add_new_tokens(load_tokenizer(DEMO / "base"), ["<|x|>"])  # the control


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"new_tokens": ["<a>", "<a>"]}, {}, "data.new_tokens: '<a>' twice"),
    ({"new_tokens": [" "]}, {}, "data.new_tokens: ' ', expected a token"),
    (
        {"new_tokens": ["<a>"]},
        {"method": "ia3", "quantize": "none"},
        "data.new_tokens: ia3 trains no rows of embedding",
    ),
]


@pytest.mark.parametrize(("data", "train", "said"), WRONG)
def test_recipes(tmp_path: Path, small: Path, data: dict[str, Any], train: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=r"lora2serve\.yaml: ") as caught:
        fit(recipe_file(tmp_path, small, {"train": "x.jsonl", **data}, **train))
    assert said in caught.value.message


def test_models_that_cannot_have_them(tmp_path: Path, small: Path, calls: dict[str, Any]) -> None:
    """A head with a bias, which PEFT would leave out; a table that is trained whole: before the base is read."""
    tokens = add_new_tokens(load_tokenizer(small), TOKENS)
    device = Device("cpu", "float32")
    phi = make_model(tmp_path / "phi", "phi", vocab_size=1536)
    with pytest.raises(TrainError, match="the head of PhiForCausalLM has a bias"):
        check_adapter(phi, TrainRecipe(), device, tokens)
    with pytest.raises(TrainError, match=r"rows of lm_head, and train.lora adapts all of it"):
        fit(recipe_file(tmp_path, small, calls, lora={"modules_to_save": ["lm_head"]}))
    assert check_adapter(small, TrainRecipe(), device, tokens) == [], "the control"
    for others in ({"shared": True, "sharded": False}, {"shared": False, "sharded": True}):
        with pytest.raises(TrainError, match="rows are added to the base, and"):
            refuse_common_base(tokens, **others)
        refuse_common_base(NO_TOKENS, **others)  # the control
