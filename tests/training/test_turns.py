"""The loss of a conversation that gives several samples is that of its turns, each behind what a server sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import data_sets
from lora2serve.data.base_template import base_template
from lora2serve.data.tokenization import Sample, tokenize_all
from lora2serve.progress import Silent
from tests.data.test_chat_turns import CHATML, THINK, TURNS
from tests.support.runs import DEMO, write_jsonl


def summed_loss(samples: list[Sample]) -> tuple[float, int]:
    """Summed negative log-likelihood of what is learned, and of how many tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            labels = torch.tensor(sample.labels)[1:]
            logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
            count += int((labels != -100).sum())
    return total, count


@pytest.mark.parametrize(("template", "count"), [(CHATML, 1), (THINK, 3)])
def test_the_loss_of_a_chat_is_that_of_its_turns(template: str, count: int, tmp_path: Path) -> None:
    whole = [{"messages": TURNS}]
    apart = [
        {
            "messages": [
                {**turn, "weight": 0} if turn["role"] == "assistant" and n != last else turn
                for n, turn in enumerate(TURNS[: last + 1])
            ]
        }
        for last in (1, 3, 5)
    ]
    prepared = base_template(DEMO / "base")
    prepared.tokenizer.chat_template = template
    samples = [
        tokenize_all(data_sets.read(str(write_jsonl(tmp_path / name, rows))), prepared, DataRecipe(train=""), Silent())
        for name, rows in (("whole.jsonl", whole), ("apart.jsonl", apart))
    ]
    assert [len(part) for part in samples] == [count, 3]
    (loss, tokens), (sum_of_turns, tokens_of_turns) = (summed_loss(part) for part in samples)
    assert tokens == tokens_of_turns
    assert loss == pytest.approx(sum_of_turns, rel=1e-5)
    assert loss > 1
