"""Rows of every form, as the trainer takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from lora2serve.data import data_sets
from tests.data.test_rows import CHAT, PAIR, TEXT
from tests.support.runs import DEMO, fit, logged, plain, recipe_file, rows, write_jsonl

pytestmark = pytest.mark.engine


def test_the_masked_loss_is_what_the_trainer_takes(tmp_path: Path) -> None:
    """The first logged loss, before any update, is the mean over the assistant's tokens and over no others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_jsonl(tmp_path / "t.jsonl", rows("train.jsonl", 4))
    settings_ = {"steps": 1, "batch_size": 4, "quantize": "none", "learning_rate": 1e-4}
    masked = logged(fit(recipe_file(tmp_path / "a", DEMO / "base", {"train": str(file)}, **settings_))[0])[1]
    everything = {"train": str(file), "completion_only": False}
    unmasked = logged(fit(recipe_file(tmp_path / "b", DEMO / "base", everything, **settings_))[0])[1]

    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    sums = {True: [0.0, 0], False: [0.0, 0]}
    for row in rows("train.jsonl", 4):
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        each = -log_probabilities[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        for only, start in ((True, len(prompt) - 1), (False, 0)):
            sums[only][0] += float(each[start:].sum())
            sums[only][1] += len(each) - start
    assert masked == pytest.approx(sums[True][0] / sums[True][1], abs=1e-4)
    assert unmasked == pytest.approx(sums[False][0] / sums[False][1], abs=1e-4)
    assert abs(masked - unmasked) > 0.05, "the control: the two can be log_probabilities apart"


def test_a_pair_is_a_conversation_and_so_is_what_parity_asks(tmp_path: Path, small: Path) -> None:
    """Mixed of two sets, one of them twice; both on record."""
    write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "id": n} for n in range(4)])
    write_jsonl(tmp_path / "b.jsonl", [CHAT] * 2)
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2}]
    run, log, _ = fit(recipe_file(tmp_path, small, {"train": sources, "eval": "a.jsonl"}, steps=1))
    turns = [{"role": "user", "content": PAIR["prompt"]}, {"role": "assistant", "content": PAIR["completion"]}]
    assert [json.loads(line) for line in run.eval_data.read_text().splitlines()] == [{"messages": turns}] * 4
    assert any(
        note.startswith("4 rows of prompt and completion are written by the chat template") for note in log.notes
    )
    assert [warning for warning in log.warnings if "not read: id (4 rows)" in warning]
    assert run.record.data.train.rows == 8
    assert [(Path(part.path).name, part.rows) for part in run.record.data.train.parts] == [
        ("a.jsonl", 4),
        ("b.jsonl", 4),
    ]


@pytest.mark.parametrize("form", [CHAT, PAIR, TEXT], ids=["messages", "pair", "text"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_each_form_trains_from_each_file(tmp_path: Path, small: Path, form: dict[str, Any], suffix: str) -> None:
    file = tmp_path / f"rows.{suffix}"
    content = [form] * 12
    if suffix == "jsonl":
        write_jsonl(file, content)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    assert plain(data_sets.read(str(file))) == content
    data = {"train": str(file), "eval_split": 0.25, "form": "raw"}
    run, log, _ = fit(recipe_file(tmp_path, small, data, steps=2))
    assert [json.loads(line) for line in run.eval_data.read_text().splitlines()] == [form] * 3
    assert run.record.data.eval.rows == 3
    assert not any("no eval data" in warning for warning in log.warnings)
