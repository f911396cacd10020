"""Rows of 40 turns in token ids, beside the plain way: ``python -m benchmarks.turns``.

The plain way, which was ours at first, is a rendering before and after each answer, ids with offsets, and
for each token a look through all turns. One process on one core; writes benchmarks/turns.json and prints a table.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from benchmarks.measure import ROOT, machine
from lora2serve.data.rendering import IGNORE, Renderer
from lora2serve.data.rows import ChatRow, Message
from lora2serve.data.served_template import ChatTemplate

TURNS, ROWS = 40, 60
LENGTH = 180  # characters of a message
TEXT = (ROOT / "lora2serve" / "data" / "general.txt").read_text(encoding="utf-8")  # of several languages, and code


def conversation(row: int) -> list[Message]:
    """One row, unlike the others: each message is drawn from somewhere in the text."""
    places = random.Random(row)
    messages: list[Message] = []
    for turn in range(TURNS):
        for role in ("user", "assistant"):
            start = places.randrange(len(TEXT) - LENGTH)
            messages.append({"role": role, "content": f"{row} {turn} {TEXT[start : start + LENGTH]}"})
    return messages


def plainly(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """The plain way, for a template that rewrites nothing."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            assert text.startswith(before) and text.startswith(after)
            turns.append((len(before), len(after)))
    labels = [
        token if any(start < last and first < stop for start, stop in turns) else IGNORE
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return list(encoded["input_ids"]), labels


def rows_a_second(ways: Mapping[str, Callable[[list[Message]], object]]) -> dict[str, float]:
    """By the median of the processor time of a row, in turns: whatever else runs here slows both."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for row in map(conversation, range(ROWS)):
        for name, work in ways.items():
            start = time.process_time()
            work(row)
            seconds[name].append(time.process_time() - start)
    return {name: 1 / median(found) for name, found in seconds.items()}


def main() -> None:
    """Measure, and write what was measured."""
    gc.set_threshold(100_000, 20)  # as the command line does
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "demo" / "base")
    tokenizer.model_max_length = 1 << 30
    renderer = Renderer(ChatTemplate(tokenizer))
    (sample,) = renderer.render(ChatRow(conversation(0))).samples
    assert (sample.ids, sample.labels) == plainly(tokenizer, conversation(0))
    rates = rows_a_second({
        "each beginning, each token": lambda messages: plainly(tokenizer, messages),
        "lora2serve": lambda messages: renderer.render(ChatRow(messages)),
    })  # fmt: skip
    found = {"machine": machine(), "turns": TURNS, "tokens_a_row": len(sample.ids), "rows_a_second": rates}
    (ROOT / "benchmarks" / "turns.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} rows of {len(sample.ids)} tokens a second")


if __name__ == "__main__":
    main()
