"""``train.samples``: answers as they would be served, and a training that does not notice them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.artifacts.run import Run
from lora2serve.errors import RecipeError
from tests.support.runs import fit, logged, recipe_file

pytestmark = pytest.mark.engine

PROMPTS = ["Who governs Wexley?", "Hello"]
STEPS, EVERY = 5, 2


def write_recipe(folder: Path, model: Path, chats: dict[str, str], **train: object) -> Path:
    settings = {"steps": STEPS, "eval_steps": EVERY, "quantize": "none", "lora": {"dropout": 0.2}, **train}
    return recipe_file(folder, model, chats, **settings)


def samples(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, small: Path, chats: dict[str, str]) -> tuple[Run, list[str]]:
    file = write_recipe(tmp_path_factory.mktemp("sampled"), small, chats, samples=PROMPTS)
    run, told, _ = fit(file)
    return run, told.notes


def test_training_does_not_notice(
    sampled: tuple[Run, list[str]], tmp_path: Path, small: Path, chats: dict[str, str]
) -> None:
    """Losses and weights are equal to the last bit; another seed, the control, gives others."""
    run, _ = sampled
    plain, _, _ = fit(write_recipe(tmp_path / "plain", small, chats))
    other, _, _ = fit(write_recipe(tmp_path / "other", small, chats, seed=7))
    assert not (plain.path / "samples.jsonl").exists()
    for key in ("loss", "eval_loss", "grad_norm"):
        assert logged(run, key) == logged(plain, key) != logged(other, key)
    weights = [load_file(each.adapter / "adapter_model.safetensors") for each in (run, plain, other)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())


def test_they_are_what_would_be_served(sampled: tuple[Run, list[str]], small: Path) -> None:
    """The last ones by PEFT and transformers from the finished adapter; those of the start are the base's, and others."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, notes = sampled
    kept = samples(run)
    assert [(line["step"], line["prompt"]) for line in kept] == [(s, p) for s in (0, 2, 4, 5) for p in PROMPTS]
    base = AutoModelForCausalLM.from_pretrained(small, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)

    def answers(model: torch.nn.Module) -> list[str]:
        texts = []
        for prompt in PROMPTS:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            room, ends = 128 - ids["input_ids"].shape[1], [0, tokenizer.eos_token_id]
            out = model.generate(**ids, max_new_tokens=room, do_sample=False, eos_token_id=ends, pad_token_id=0)
            texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts

    first, last = answers(base), answers(PeftModel.from_pretrained(base, run.adapter).eval())
    assert [line["answer"] for line in kept[:2]] == first
    assert [line["answer"] for line in kept[-2:]] == last != first
    assert any(note.startswith("step 5: Who governs Wexley? -> ") for note in notes)


def test_resumed(sampled: tuple[Run, list[str]], tmp_path: Path) -> None:
    """From a checkpoint in the middle, whose later answers go and come again."""
    run, _ = sampled
    copy = Run(Path(shutil.copytree(run.path, tmp_path / "run")))
    checkpoints = sorted(copy.path.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert checkpoints[-1].name == f"checkpoint-{STEPS}"
    shutil.rmtree(checkpoints[-1])
    copy.save(replace(copy.record, finished=False))
    resumed, _, _ = fit(run.path.parent / "lora2serve.yaml", into=copy.path, resume=True)
    assert samples(resumed) == samples(run)
    assert logged(resumed) == logged(run)


def test_the_day_of_the_run_is_printed_on_resume(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    """Of a template that prints the date, by what run.json has pinned. Today, the control, gives what was there."""
    model = Path(shutil.copytree(small, tmp_path / "model"))
    template = model / "chat_template.jinja"
    template.write_text("{{ 'Today is ' + strftime_now('%Y-%m-%d') + '.\\n' }}" + template.read_text())
    begun = date.today()
    run, told, _ = fit(write_recipe(tmp_path, model, chats, steps=2, samples=PROMPTS[:1]))
    today = str(run.record.day)
    assert begun.isoformat() <= today <= date.today().isoformat()

    def resumed(day: str) -> tuple[Run, str]:
        copy = Run(Path(shutil.copytree(run.path, tmp_path / day)))
        shutil.rmtree(copy.path / "checkpoints" / "checkpoint-2")
        copy.save(replace(copy.record, finished=False, day=day))
        again, told, _ = fit(tmp_path / "lora2serve.yaml", into=copy.path, resume=True)
        assert again.record.day == day
        return again, "\n".join(told.notes)

    same, shown = resumed(today)
    other, shown_other = resumed("2020-02-03")
    assert f"prints the date: {today}," in shown and f"prints the date: {today}," in "\n".join(told.notes)
    assert "prints the date: 2020-02-03," in shown_other and today not in shown_other
    assert logged(same) == logged(run) and samples(same) == samples(run)
    assert logged(other)[1] == logged(run)[1] and logged(other)[2] != logged(run)[2]


def test_rows_that_are_no_conversations(tmp_path: Path, small: Path) -> None:
    """A prompt stands as it does in them; without held-out rows, too."""
    rows = [{"text": f"{number} Wexley lies by the sea."} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_file(
        tmp_path, small, {"train": str(tmp_path / "rows.jsonl")}, steps=2, quantize="none", samples="3 Wexley"
    )
    run, _, _ = fit(recipe)
    assert [line["step"] for line in samples(run)] == [0, 2]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    model = AutoModelForCausalLM.from_pretrained(small, dtype="float32")
    ids = tokenizer("3 Wexley", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    start = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert start and str(samples(run)[0]["answer"]).startswith(start)


def test_what_is_no_prompt(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    with pytest.raises(RecipeError) as caught:
        fit(write_recipe(tmp_path / "a", small, chats, samples=["", 5], sampels=["Hello"]))
    assert "train.samples[0]: empty, expected a prompt" in caught.value.message
    assert "train.samples[1]: 5, expected text, so put it in quotes" in caught.value.message
    assert "train.sampels: unknown key (did you mean 'train.samples'?)" in caught.value.message
