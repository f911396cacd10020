"""DPO and KTO: the loss of TRL by hand, margins that rise, one figure whatever the batch, runs that go on and are exported."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import TrainRecipe
from lora2serve.config.train_methods import LAYERS, LORA
from lora2serve.training import model as models
from lora2serve.training.batch_parts import parts, units
from lora2serve.training.checkpoints import last_checkpoint
from lora2serve.training.method_config import adapter_config
from tests.support.runs import DEMO, fit, logged, preferences, recipe_file, write_jsonl
from tests.training.test_methods import OPTIONS

pytestmark = pytest.mark.engine

PLAIN: dict[str, Any] = {"objective": "dpo", "quantize": "none", "learning_rate": 5e-3, "schedule": "constant"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``data`` of a recipe: 24 pairs to train on, and 9 held out (other questions, the same facts)."""
    root = tmp_path_factory.mktemp("pairs")
    trained = preferences("train.jsonl", 24)
    facts = [row["chosen"] for row in trained]
    held_out = [row for row in preferences("eval.jsonl", 120) if row["chosen"] in facts][:9]
    train = write_jsonl(root / "train.jsonl", trained)
    return {"train": str(train), "eval": str(write_jsonl(root / "eval.jsonl", held_out))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str]) -> Run:
    """Of a real base, in 24 steps."""
    folder = tmp_path_factory.mktemp("trained")
    run, _, _ = fit(recipe_file(folder, DEMO / "base", pairs, steps=24, eval_steps=8, batch_size=8, **PLAIN))
    return run


def by_hand(
    folder: Path, data: dict[str, str], steps: int, trainer_class: Any, config_class: Any, **options: Any
) -> list[dict[str, float]]:
    """The script that people write: TRL reads the rows, renders them, makes the adapter and trains it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = Dataset.from_list([json.loads(line) for line in Path(data["train"]).read_text().splitlines()])
    rows = rows.shuffle(seed=42) if "label" in rows.column_names else rows
    arguments = config_class(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3,
        lr_scheduler_type="constant", warmup_steps=math.ceil(0.03 * steps), max_grad_norm=0.3, seed=42, data_seed=42,
        bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, max_length=128, **options,
    )  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32), args=arguments,
        train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(DEMO / "base"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


OTHER_LOSSES = {"beta": 0.4, "loss_type": ["sigmoid", "ipo"], "loss_weights": [0.8, 0.2]}


@pytest.mark.parametrize("options", [{}, pytest.param(OTHER_LOSSES, marks=pytest.mark.slow)])
def test_the_loss_is_that_of_trl_by_hand(tmp_path: Path, pairs: dict[str, str], options: dict[str, Any]) -> None:
    """Step by step, margins and log-probabilities as well: the rows are tokenized alike here, by this template."""
    from trl import DPOConfig, DPOTrainer

    run, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", pairs, steps=5, preference=options, **PLAIN))
    expected = by_hand(tmp_path / "b", pairs, 5, DPOTrainer, DPOConfig, **options)
    for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"):
        assert list(logged(run, key).values()) == pytest.approx([line[key] for line in expected], abs=2e-4), key
    assert abs(logged(run)[5] - logged(run)[1]) > 2e-3, "the control: it changes"


def test_margins_rise_and_held_out_pairs_are_told_apart(trained: Run) -> None:
    margins = logged(trained, "rewards/margins")
    assert margins[1] == 0, "the adapter changes nothing yet"
    assert margins[24] > 0.3
    held_out = logged(trained, "eval_rewards/margins")
    assert held_out[24] > held_out[8]
    assert logged(trained, "eval_loss")[24] < math.log(2)
    found = trained.record.metrics.preference
    assert found is not None and found.rows == 9
    assert found.margin == pytest.approx(found.chosen - found.rejected, abs=1e-5)
    for name, value in (
        ("loss", found.loss),
        ("rewards/margins", found.margin),
        ("rewards/accuracies", found.accuracy),
    ):
        assert value == pytest.approx(logged(trained, f"eval_{name}")[24], abs=1e-5)
    assert (trained.path / "loss.png").stat().st_size > 1000


def test_figures_are_those_of_the_models_themselves(trained: Run) -> None:
    """The oracle: the base and PEFT's model, asked for each answer by transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.adapter)
    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    rows = [json.loads(line) for line in trained.eval_data.read_text().splitlines()]

    def answers(model: Any, side: str) -> torch.Tensor:
        sums = []
        for row in rows:
            turns = [{key: turn[key] for key in ("role", "content")} for turn in row["prompt"]]
            options: dict[str, Any] = {"tokenize": True, "return_dict": False}
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template([*turns, *row[side]], **options)
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(whole))
            sums.append(sum(float(scores[place - 1, whole[place]]) for place in places))
        return torch.tensor(sums)

    before = {side: answers(base, side) for side in ("chosen", "rejected")}
    tuned = PeftModel.from_pretrained(base, trained.adapter)
    chosen, rejected = (0.1 * (answers(tuned, side) - before[side]) for side in ("chosen", "rejected"))
    found = trained.record.metrics.preference
    assert found is not None
    assert found.chosen == pytest.approx(float(chosen.mean()), abs=1e-4)
    assert found.margin == pytest.approx(float((chosen - rejected).mean()), abs=1e-4)
    assert found.accuracy == pytest.approx(float((chosen > rejected).float().mean()))
    assert found.loss == pytest.approx(float(-torch.nn.functional.logsigmoid(chosen - rejected).mean()), abs=1e-4)


def test_whatever_the_pieces_a_step_and_an_evaluation_are_the_same(
    tmp_path: Path, small: Path, pairs: dict[str, str]
) -> None:
    """24 pairs in batches of 5: the last step of an epoch has pieces of unlike size."""
    options = {**PLAIN, "steps": None, "epochs": 1, "eval_steps": 3}
    whole, _, _ = fit(recipe_file(tmp_path / "a", small, pairs, **{**options, "batch_size": 15}))
    pieces, _, _ = fit(recipe_file(tmp_path / "b", small, pairs, **{**options, "batch_size": 5, "accumulation": 3}))
    assert list(logged(whole)) == list(logged(pieces)) == [1, 2]
    for key in ("loss", "grad_norm", "eval_loss", "eval_rewards/margins"):
        assert list(logged(pieces, key).values()) == pytest.approx(list(logged(whole, key).values()), abs=1e-5), key


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str]) -> dict[str, str]:
    """The same answers one by one, with a label each."""
    root, files = tmp_path_factory.mktemp("labels"), {}
    for name, path in pairs.items():
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        each = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows for side in ("chosen", "rejected")
        ]  # fmt: skip
        files[name] = str(write_jsonl(root / f"{name}.jsonl", each))
    return files


KTO: dict[str, Any] = {**PLAIN, "objective": "kto"}


WITHOUT_KL = {"loss_type": "apo_zero_unpaired", "beta": 0.3, "undesirable_weight": 1.2}


@pytest.mark.parametrize("options", [{}, pytest.param(WITHOUT_KL, marks=pytest.mark.slow)])
def test_the_loss_of_kto_is_that_of_trl_by_hand(
    tmp_path: Path, labels: dict[str, str], options: dict[str, Any]
) -> None:
    """On the same rows in the same order, which stays as it is: batches hold what is compared."""
    from trl import KTOConfig, KTOTrainer

    run, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", labels, steps=5, preference=options, **KTO))
    expected = by_hand(tmp_path / "b", labels, 5, KTOTrainer, KTOConfig, **options)
    for key in ("loss", "rewards/margins", "kl", "logps/chosen", "logps/rejected", "grad_norm"):
        there = {line["step"]: line[key] for line in expected if key in line}
        assert logged(run, key) == pytest.approx(there, abs=2e-4), key
    assert abs(logged(run)[5] - logged(run)[1]) > 2e-3, "the control: it changes"


def test_kto_tells_held_out_answers_apart_and_goes_on(tmp_path: Path, labels: dict[str, str]) -> None:
    """Margins rise; a run that goes on from a checkpoint ends with the same bits."""
    options = {**KTO, "steps": 18, "eval_steps": 6, "batch_size": 8}
    run, told, _ = fit(recipe_file(tmp_path, DEMO / "base", labels, **options))
    margins = logged(run, "eval_rewards/margins")
    assert margins[18] > margins[6] and margins[18] > 0.1
    found = run.record.metrics.preference
    assert found is not None and (found.rows, found.accuracy) == (18, None)
    assert found.margin == pytest.approx(margins[18], abs=1e-5)
    assert any(note.startswith("the first answer that is labeled false:") for note in told.notes)
    assert any(note.startswith("held out: margin") for note in told.notes)
    other = Run(tmp_path / "again")
    shutil.copytree(run.path, other.path)
    shutil.rmtree(other.adapter)
    shutil.rmtree(other.path / "checkpoints" / "checkpoint-18")
    other.save(replace(other.record, finished=False))
    resumed, _, _ = fit(other.recipe, into=other.path, resume=True)
    assert_same(resumed, run)


def test_the_picture_of_labels_that_no_batch_compares(tmp_path: Path) -> None:
    """Batches of one row have no margin; held-out answers do, and the losses are none of tokens."""
    from PIL import Image

    from lora2serve.training.plot import plot

    def size(*lines: dict[str, float]) -> tuple[int, int]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot(Run(tmp_path))
        with Image.open(tmp_path / "loss.png") as image:
            return image.size

    step = {"step": 1, "loss": 0.5}
    both = size({**step, "rewards/margins": 0.2}, {"step": 1, "eval_loss": 0.4, "eval_rewards/margins": 0.1})
    held_out = {"step": 1, "eval_loss": 0.4, "eval_rewards/margins": 0.1}
    assert size({**step, "rewards/chosen": 0.1}, held_out) == both
    assert size(step, {"step": 1, "eval_loss": 0.4}) != both, "the control: of sft"


def test_parts_keep_pairs_together() -> None:
    """Both answers of a pair go through at once, and all pairs go."""
    ids = torch.arange(10)[:, None].expand(10, 3)
    batch = {"input_ids": ids, "completion_mask": torch.ones(10, 3), "n": 7}
    assert units(batch) == 5
    found = [part["input_ids"][:, 0].tolist() for part in parts(batch, 2)]  # type: ignore[index]
    assert found == [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]
    assert units({"input_ids": ids}) == 10, "the control: rows of sft"


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, trained: Run) -> None:
    """From the state of step 21, as after a kill; and from the last one, where no step is left."""
    run = Run(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    shutil.rmtree(run.adapter)
    for checkpoint in run.path.glob("checkpoints/checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > 23:
            shutil.rmtree(checkpoint)
    run.save(replace(run.record, finished=False, metrics=replace(run.record.metrics, preference=None)))
    assert last_checkpoint(run) is not None
    resumed, _, _ = fit(run.recipe, into=run.path, resume=True)
    assert_same(resumed, trained)
    shutil.rmtree(run.adapter)
    run.save(replace(run.record, finished=False, metrics=replace(run.record.metrics, preference=None)))
    again, _, _ = fit(run.recipe, into=run.path, resume=True)
    assert_same(again, trained)


def assert_same(run: Run, other: Run) -> None:
    ones, others = (load_file(each.adapter / "adapter_model.safetensors") for each in (run, other))
    assert all(torch.equal(ones[name], others[name]) for name in others)
    for key in ("loss", "rewards/margins", "eval_loss", "num_tokens"):
        assert logged(run, key) == logged(other, key), key
    assert run.record.metrics.preference == other.record.metrics.preference


def test_early_stopping_goes_by_held_out_pairs(tmp_path: Path, pairs: dict[str, str]) -> None:
    """Held-out pairs that want the opposite: each step makes it worse, and the first evaluation is the best."""
    rows = [json.loads(line) for line in Path(pairs["train"]).read_text().splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:6]]
    data = {**pairs, "eval": str(write_jsonl(tmp_path / "turned.jsonl", turned))}
    options = {**PLAIN, "eval_steps": 1, "early_stopping": 2, "learning_rate": 1e-2}
    run, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", data, steps=12, **options))
    losses = logged(run, "eval_loss")
    best = min(losses, key=lambda step: losses[step])
    assert run.record.steps == best + 2 < 12
    found = run.record.metrics.preference
    assert found is not None and found.loss == pytest.approx(losses[best], abs=1e-5), "the best state is kept"


def test_on_a_4_bit_base_with_checkpointing(tmp_path: Path, pairs: dict[str, str]) -> None:
    options = {**PLAIN, "quantize": "nf4"}
    on, told, _ = fit(
        recipe_file(tmp_path / "a", DEMO / "base", pairs, steps=3, gradient_checkpointing=True, **options)
    )
    off, _, _ = fit(recipe_file(tmp_path / "b", DEMO / "base", pairs, steps=3, **options))
    assert logged(on)[1] == pytest.approx(math.log(2), abs=1e-6)
    assert list(logged(on).values()) == pytest.approx(list(logged(off).values()), abs=1e-4)
    assert on.record.quantization is not None
    assert any(note.startswith("the first answer that is rejected:") for note in told.notes)
    assert any("DPO by QLoRA (nf4)" in note for note in told.notes)
    assert {weight.dtype for weight in load_file(on.adapter / "adapter_model.safetensors").values()} == {torch.float32}
    assert set(json.loads((on.adapter / "adapter_config.json").read_text())["target_modules"]), "one adapter"
    assert not (on.adapter / "ref").exists(), "and no copy of it"


METHODS = [pytest.param(name, marks=() if name in ("lora", "ia3") else pytest.mark.slow) for name in (LORA, *LAYERS)]


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_base_whatever_the_adapter(small: Path, method: str) -> None:
    """With the adapter off, after it was trained: what it learned is random here."""
    recipe = TrainRecipe(method, OPTIONS.get(method, {}), quantize="none")
    model = models.prepare(models.load_base(small, recipe, models.Device("cpu", "float32")), checkpointing=False)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        base = model(ids).logits.clone()
        tuned = models.add_adapter(model, adapter_config(model, recipe, small))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        assert not torch.equal(tuned(ids).logits, base), "the control"
        with tuned.disable_adapter():
            assert torch.equal(tuned(ids).logits, base)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_its_exports_answer_like_it(tmp_path: Path, trained: Run, labels: dict[str, str], objective: str) -> None:
    """Every gate in transformers and llama.cpp, as of any other run."""
    run = trained
    if objective == "kto":
        run, _, _ = fit(recipe_file(tmp_path / "kto", DEMO / "base", labels, steps=12, batch_size=8, **KTO))
    options = {"dtype": "fp32", "quants": ["F32"], "out": tmp_path / "out"}
    exports = [export.path for export in lora2serve.export(run.path, targets=["vllm", "gguf"], **options)]
    engines = ["transformers", "llama.cpp"]
    result = lora2serve.parity(run.path, exports, engines=engines, report_dir=tmp_path / "parity")
    assert [row.engine for row in result.report.rows] == engines and result.met, result.report.rows
    broken = Path(shutil.copytree(exports[0], tmp_path / "broken"))
    shutil.copy(Path(run.record.base.path) / "model.safetensors", broken / "model.safetensors")
    again = lora2serve.parity(run.path, broken, engines="transformers", report_dir=tmp_path / "again")
    assert not again.met, "the control: the base's weights"
