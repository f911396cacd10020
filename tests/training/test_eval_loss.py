"""The eval loss is the mean over all tokens: of any model, in any batches, in the loop as at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora2serve.data.samples import Sample
from lora2serve.progress import Silent
from lora2serve.training import tiled_head
from lora2serve.training.eval_loss import RowLosses, evaluate
from lora2serve.training.tiled_head import token_losses
from tests.support.families import FAMILIES, HANDFUL, make_family
from tests.support.runs import DEMO, fit, logged, recipe_file, uneven_data

pytestmark = pytest.mark.engine


def batch(vocabulary: int = 320, length: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows, the second one padded, whose first tokens are not learned."""
    ids = torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 4] = -100
    return ids, mask, labels


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in HANDFUL else pytest.mark.slow) for kind in FAMILIES]
)
def test_every_family_by_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model's own logits as a whole; and the model is left as it was."""
    model = make_family(kind)
    ids, mask, labels = batch()
    wanted = labels[:, 1:] != -100
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][wanted].float()
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="none")
    monkeypatch.setattr(tiled_head, "TILE", 320 * 4)
    found = token_losses(model, ids, mask, labels)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found.roll(1), expected, atol=1e-3), "the control: the order of the tokens"
    assert "forward" not in vars(model.base_model)


def peak(work: Callable[[], object]) -> int:
    """Bytes that torch's allocator had given out at once while ``work`` ran, by its own records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    live = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


VOCABULARY = 152_000


def test_memory_is_a_tile_of_the_vocabulary() -> None:
    model = make_family("llama", vocab_size=VOCABULARY)
    short, long = batch(VOCABULARY, 128), batch(VOCABULARY, 512)
    with torch.no_grad():
        whole = peak(lambda: model(input_ids=short[0], attention_mask=short[1]).logits.log_softmax(-1))
    peaks = [peak(lambda part=part: token_losses(model, *part)) for part in (short, long)]
    assert max(peaks) < 2.5 * 4 * tiled_head.TILE
    assert peaks[1] < 1.1 * peaks[0], "four times the tokens take no more"
    assert whole > 1.5 * peaks[1], "the control: all logits of a quarter of the tokens"


@pytest.mark.slow
def test_memory_is_less_than_that_of_a_training_step() -> None:
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model: Any = get_peft_model(make_family("llama", vocab_size=VOCABULARY), config)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))  # as TRL's trainer does
    ids, mask, labels = batch(VOCABULARY, 256)

    def step() -> None:
        output = model.train()(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (-output.log_probs.sum()).backward()

    assert peak(lambda: token_losses(model, ids, mask, labels)) < peak(step)


def uneven(count: int = 7) -> list[Sample]:
    """Rows of very different lengths, of which every other token is learned."""
    generator = torch.Generator().manual_seed(2)
    samples = []
    for number in range(count):
        ids = torch.randint(3, 320, (3 + 15 * (number % 3),), generator=generator).tolist()
        samples.append(Sample(ids, [token if place % 2 else -100 for place, token in enumerate(ids)], False, number))
    return samples


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_mean_over_tokens_in_any_batches(size: int) -> None:
    model = make_family("llama")
    samples = uneven()
    sums, counts = [], []
    for sample in samples:
        ids, labels = torch.tensor(sample.input_ids), torch.tensor(sample.labels)[1:]
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        sums.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)))
        counts.append(int((labels != -100).sum()))
    losses = evaluate(model, samples, 0, size, Silent(), "eval")
    assert losses.tokens.tolist() == counts
    assert losses.sums.tolist() == pytest.approx(sums, rel=1e-5)
    mean = losses.mean()
    assert mean.eval_loss == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert (mean.tokens, mean.perplexity) == (sum(counts), pytest.approx(math.exp(mean.eval_loss)))
    by_two = [replace(sample, row=number // 2) for number, sample in enumerate(samples)]
    assert evaluate(model, by_two, 0, size, Silent(), "eval").tokens.tolist() == [
        sum(counts[place : place + 2]) for place in range(0, len(counts), 2)
    ], "samples of one row are one unit"
    by_rows = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)
    assert abs(mean.eval_loss - by_rows) > 1e-3, "the control: a mean of the rows' means"


def test_the_interval_of_a_difference() -> None:
    """Against what many drawn sets of rows give: 95 % of the intervals hold the true difference."""
    generator = torch.Generator().manual_seed(3)
    held, width = 0, []
    for _ in range(400):
        tokens = torch.randint(5, 60, (12,), generator=generator)
        shared = torch.randn(12, generator=generator).double() * 3 * tokens  # rows differ more than the two models
        apart = (0.02 + 0.05 * torch.randn(12, generator=generator).double()) * tokens
        found = RowLosses(shared + apart, tokens).less(RowLosses(shared, tokens))
        held += found.low <= 0.02 <= found.high
        width.append(found.high - found.low)
        assert found.rows == 12 and found.low < found.mean < found.high
    assert 0.92 <= held / 400 <= 0.98
    assert sum(width) / 400 < 0.1, "paired: not the spread of the rows, which is 3"
    tokens = torch.tensor([5, 5, 5])
    few = RowLosses(tokens.double(), tokens).less(RowLosses(2.0 * tokens, tokens))
    assert (few.mean, few.low, few.high) == (-1.0, -math.inf, math.inf)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Held-out rows of one to sixty words, and rows to train on."""
    return uneven_data(tmp_path_factory.mktemp("lengths"), 8, 8)


LAST: dict[str, Any] = {"steps": 2, "eval_steps": 2, "learning_rate": 0.01}


@pytest.mark.parametrize(("size", "packing"), [(1, False), (4, False), (2, True)])
def test_the_loop_says_what_the_end_says(tmp_path: Path, lengths: dict[str, str], size: int, packing: bool) -> None:
    run, _, _ = fit(recipe_file(tmp_path, DEMO / "base", {**lengths, "packing": packing}, **LAST, batch_size=size))
    tuned = run.record.metrics.tuned
    assert tuned is not None
    assert logged(run, "eval_loss")[2] == pytest.approx(tuned.eval_loss, abs=1e-5)
    assert logged(run, "eval_tokens")[2] == tuned.tokens


def test_when_it_is_evaluated_changes_no_training(tmp_path: Path, lengths: dict[str, str]) -> None:
    """It draws no random number of the training's, on which the masks of dropout hang."""
    seen = {}
    for name, every in (("often", 1), ("last", 4)):
        options = {"steps": 4, "eval_steps": every, "learning_rate": 0.01, "lora": {"dropout": 0.3}}
        run, _, _ = fit(recipe_file(tmp_path / name, DEMO / "base", lengths, **options))
        assert len(logged(run, "eval_loss")) == 4 // every
        seen[name] = logged(run, "loss"), (run.adapter / "adapter_model.safetensors").read_bytes()
    assert seen["often"] == seen["last"] and len(seen["last"][0]) == 4
