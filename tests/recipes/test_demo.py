"""The shipped model and data are what the README says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.gguf.native.pretokenizer import pre_tokenizer
from lora2serve.config.recipe import find, load
from lora2serve.data.row_forms import parse_row

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "base")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]


def test_recipe_finds_its_files() -> None:
    recipe = load(find("demo"))
    for path in (recipe.model.path, recipe.data.train, recipe.data.eval, recipe.parity.general):
        assert path is not None
        assert Path(path).exists(), path


def test_size_and_shape() -> None:
    assert sum(path.stat().st_size for path in (DEMO / "base").iterdir()) < 6_000_000
    config = json.loads((DEMO / "base" / "config.json").read_text())
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0, "K-quants need rows of 256"
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["dtype"] == "bfloat16"


def test_it_has_learned(tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    losses = []
    for row in rows("general.jsonl")[:20]:
        ids = torch.tensor([tokenizer.encode(row["text"])])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    assert math.exp(sum(losses) / len(losses)) < 5
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        assert float(model(shuffled, labels=shuffled).loss) > 4, "the control: no sense, no probability"


def test_tokenizer(tokenizer: Any) -> None:
    for text in ("Hello, Wörld! 123\n\t🙂", *(row["text"] for row in rows("general.jsonl")[:5])):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"):
        assert len(tokenizer.encode(token)) == 1
    assert pre_tokenizer(DEMO / "base", json.loads((DEMO / "base" / "tokenizer.json").read_text())) == "gpt-2"
    eos = json.loads((DEMO / "base" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]) == eos


def test_template(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_data(tokenizer: Any) -> None:
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")
    assert not [problem for row in train + held_out if isinstance(problem := parse_row(row), str)]
    asked = [{row["messages"][-2]["content"] for row in part} for part in (train, held_out)]
    assert not asked[0] & asked[1], "the held-out rows ask in other words"
    answers = [{row["messages"][-1]["content"] for row in part} for part in (train, held_out)]
    assert answers[0] == answers[1], "for the same facts"
    scored = sum(len(tokenizer.apply_chat_template(row["messages"], tokenize=False)) // 4 for row in held_out)
    assert scored + sum(len(tokenizer.encode(row["text"])) for row in rows("general.jsonl")) > 4000
