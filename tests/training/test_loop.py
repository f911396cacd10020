"""The loop: packing, steps and epochs, schedule, early stopping, the best state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.artifacts.run_record import LoopRecord
from lora2serve.config.recipe import Recipe, load
from lora2serve.errors import TrainError
from lora2serve.training import schedule, trainer
from tests.support.runs import DEMO, fit, logged, recipe_file, rows, write_jsonl

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four rows that fit into one pack of 256 tokens."""
    return {"train": str(write_jsonl(tmp_path_factory.mktemp("four") / "t.jsonl", rows("train.jsonl", 4)))}


def test_packed_rows_do_not_see_each_other(tmp_path: Path, four: dict[str, str]) -> None:
    """One step over all rows gives the same loss packed or not; rows run together without borders do not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"steps": 1, "batch_size": 4, "quantize": "none"}
    plain, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", {**four, "max_length": 256}, **options))
    packed, _, _ = fit(
        recipe_file(tmp_path / "b", DEMO / "base", {**four, "max_length": 256, "packing": True}, **options)
    )
    assert logged(packed)[1] == pytest.approx(logged(plain)[1], abs=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    ids = [
        tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        for row in rows("train.jsonl", 4)
    ]
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    with torch.no_grad():
        joined = model(torch.tensor([[token for row in ids for token in row]])).logits
        alone = model(torch.tensor([ids[-1]])).logits
    assert (joined[0, -len(ids[-1]) :] - alone[0]).abs().max() > 0.1, "the control: neighbors would be seen"


def test_steps_are_counted_in_packed_rows(tmp_path: Path, four: dict[str, str]) -> None:
    one_epoch: dict[str, Any] = {"steps": None, "epochs": 2, "batch_size": 1}
    plain, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", {**four, "max_length": 256}, **one_epoch))
    packed, _, _ = fit(
        recipe_file(tmp_path / "b", DEMO / "base", {**four, "max_length": 256, "packing": True}, **one_epoch)
    )
    assert plain.record.steps == 8
    assert packed.record.steps < 8
    assert packed.record.steps % 2 == 0


def recipe(tmp_path: Path, **train: Any) -> Recipe:
    return load(recipe_file(tmp_path, DEMO / "base", {"train": "x", "eval": "y"}, **train))


@pytest.mark.parametrize(
    ("train", "count", "expected"),
    [
        ({"steps": None, "epochs": 3, "batch_size": 4}, 10, 9),
        ({"steps": None, "epochs": 3, "batch_size": 4, "accumulation": 2}, 10, 6),
        ({"steps": None, "epochs": 0.5, "batch_size": 4}, 10, 2),
        ({"steps": 7, "epochs": 3, "batch_size": 4}, 10, 7),
        ({"steps": None, "epochs": 0.01, "batch_size": 8}, 1, 1),
    ],
)
def test_total_steps(tmp_path: Path, train: dict[str, Any], count: int, expected: int) -> None:
    assert schedule.total_steps(recipe(tmp_path, **train), count) == expected


def test_accumulation_is_one_larger_batch(tmp_path: Path, chats: dict[str, str]) -> None:
    whole, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", chats, steps=3, batch_size=8))
    parts, _, _ = fit(recipe_file(tmp_path / "b", DEMO / "base", chats, steps=3, batch_size=2, accumulation=4))
    assert list(logged(parts)) == [1, 2, 3]
    for step, loss in logged(whole).items():
        assert logged(parts)[step] == pytest.approx(loss, abs=2e-3)
    other, _, _ = fit(recipe_file(tmp_path / "c", DEMO / "base", chats, steps=3, batch_size=2))
    assert abs(logged(other)[3] - logged(whole)[3]) > 0.01, "the control: a smaller batch"


def test_schedule_and_warmup(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    run, _, _ = fit(recipe_file(tmp_path / "a", small, chats, steps=10, warmup=0.2, schedule="linear"))
    rates = logged(run, "learning_rate")
    assert rates[1] == 0
    assert rates[3] == pytest.approx(2e-3)
    assert rates[10] == pytest.approx(2e-3 / 8)
    flat, _, _ = fit(recipe_file(tmp_path / "b", small, chats, steps=4, schedule="constant", log_interval=2))
    assert logged(flat, "learning_rate") == {2: 2e-3, 4: 2e-3}


def test_weights_are_clipped_and_decayed_as_said(tmp_path: Path, small: Path) -> None:
    where = trainer.Device("cpu", "float32")
    from lora2serve.artifacts.run import Run

    options: dict[str, Any] = {"max_grad_norm": 0.7, "weight_decay": 0.1, "eval_steps": 3, "save_best": True}
    loop = LoopRecord("adamw_torch", True, rows=2, accumulation=3)
    given = trainer._arguments(recipe(tmp_path, **options), Run(tmp_path), where, 10, True, loop)
    assert (given.max_grad_norm, given.weight_decay, given.save_steps, given.eval_steps) == (0.7, 0.1, 3, 3)
    assert (given.bf16, given.fp16, given.use_cpu, given.gradient_checkpointing) == (False, False, True, True)
    assert given.report_to in ([], ["none"], "none")
    assert given.optim == "adamw_torch"
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (2, 3)
    loop = LoopRecord("paged_adamw_32bit", False)
    on_gpu = trainer._arguments(recipe(tmp_path), Run(tmp_path), trainer.Device("cuda", "float32"), 10, True, loop)
    assert (on_gpu.optim, on_gpu.gradient_checkpointing) == ("paged_adamw_32bit", False)


def test_clipping_and_decay_do_something(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    """AdamW hides the size of a gradient until it is clipped below its epsilon; decay shrinks the untrained A."""

    def trained(name: str, **options: Any) -> dict[str, torch.Tensor]:
        flat = {"steps": 4, "warmup": 0, "schedule": "constant", "learning_rate": 0.01, **options}
        run, _, _ = fit(recipe_file(tmp_path / name, small, {"train": chats["train"]}, **flat))
        return load_file(run.adapter / "adapter_model.safetensors")

    def size(tensors: dict[str, torch.Tensor], part: str) -> float:
        return sum(float(tensor.norm()) for name, tensor in tensors.items() if part in name)

    plain, off = trained("plain"), trained("off", max_grad_norm=0)
    clipped, decayed = trained("clipped", max_grad_norm=1e-12), trained("decayed", weight_decay=1.0)
    assert size(clipped, "lora_B") < 0.01 * size(plain, "lora_B")
    assert size(off, "lora_B") == pytest.approx(size(plain, "lora_B"), rel=0.2), "0 is no clipping, not no gradient"
    shrunk = (1 - 0.01 * 1.0) ** 4
    assert size(decayed, "lora_A") == pytest.approx(shrunk * size(plain, "lora_A"), rel=0.01)


def test_a_tracker_gets_the_losses(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    """TensorBoard's files, read back: records of length, checksum, event and checksum."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    run, _, _ = fit(recipe_file(tmp_path, small, chats, steps=3, trackers="tensorboard"))
    (file,) = (run.path / "tensorboard").glob("events.*")
    raw, place, found = file.read_bytes(), 0, {}
    while place < len(raw):
        length = int.from_bytes(raw[place : place + 8], "little")
        event = Event.FromString(raw[place + 12 : place + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        place += 12 + length + 4
    for step, loss in logged(run).items():
        assert found["train/loss", step] == pytest.approx(loss)
    plain, _, _ = fit(recipe_file(tmp_path / "b", small, chats, steps=1))
    assert not (plain.path / "tensorboard").exists(), "the control: no tracker by default"


@pytest.fixture(scope="module")
def harmful(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Training rows of noise and held-out rows of sense: the more steps, the worse."""
    root = tmp_path_factory.mktemp("harmful")
    noise = [{"text": row["text"][::-1]} for row in rows("general.jsonl", 16)]
    return {
        "train": str(write_jsonl(root / "t.jsonl", noise)),
        "eval": str(write_jsonl(root / "e.jsonl", rows("general.jsonl", 4))),
    }


EACH_STEP: dict[str, Any] = {"eval_steps": 1, "schedule": "constant", "warmup": 0, "learning_rate": 0.01}


def test_early_stopping_and_the_best_state(tmp_path: Path, harmful: dict[str, str]) -> None:
    """Evaluation gets worse with every step: training stops and the best state is kept."""
    run, _, _ = fit(recipe_file(tmp_path, DEMO / "base", harmful, steps=30, early_stopping=2, **EACH_STEP))
    held_out = logged(run, "eval_loss")
    best = min(held_out, key=lambda step: held_out[step])
    assert run.record.steps == best + 2, "two evaluations without a better one"
    kept = load_file(run.adapter / "adapter_model.safetensors")
    at_best = load_file(run.path / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], at_best[name]) for name in kept)
    assert run.record.metrics.tuned.eval_loss == pytest.approx(held_out[best], rel=0.05)


def test_without_save_best_the_last_state_is_kept(tmp_path: Path, harmful: dict[str, str]) -> None:
    last, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", harmful, steps=4, **EACH_STEP))
    best, _, _ = fit(recipe_file(tmp_path / "b", DEMO / "base", harmful, steps=4, save_best=True, **EACH_STEP))
    held_out = logged(last, "eval_loss")
    assert held_out[4] > 1.05 * min(held_out.values()), "the control: the last state is not the best one"
    assert last.record.metrics.tuned.eval_loss == pytest.approx(held_out[4], rel=0.02)
    assert best.record.metrics.tuned.eval_loss == pytest.approx(min(held_out.values()), rel=0.02)


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, chats: dict[str, str]) -> None:
    on, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", chats, steps=3, gradient_checkpointing=True))
    off, _, _ = fit(recipe_file(tmp_path / "b", DEMO / "base", chats, steps=3))
    assert on.record.loop == LoopRecord("adamw_torch", True, 4, 1, compiled=False, varlen=False)
    assert off.record.loop == LoopRecord("adamw_torch", False, 4, 1, compiled=False, varlen=False), "they fit here"
    assert off.record.speed and off.record.speed.tokens_per_second > 0 and off.record.speed.share_of_limit is None
    for step, loss in logged(on).items():
        assert logged(off)[step] == pytest.approx(loss, abs=1e-4)


def test_the_log_is_json_lines_of_finite_numbers(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    run, _, _ = fit(recipe_file(tmp_path, small, chats, steps=2))
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values())


@pytest.mark.parametrize(
    ("tracker", "said"), [("wandbb", "did you mean 'wandb'"), ("comet_ml", "comet_ml is not installed")]
)
def test_a_tracker_that_cannot_be_is_met_before_the_model_loads(
    tmp_path: Path, chats: dict[str, str], tracker: str, said: str
) -> None:
    with pytest.raises(TrainError, match=said) as caught:
        fit(recipe_file(tmp_path, tmp_path / "no-model-here", chats, trackers=[tracker]))
    assert caught.value.hint
