"""A real QLoRA fine-tune by bitsandbytes, PEFT and TRL, and every figure it keeps, computed again by other means."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import LossDifference
from lora2serve.training import finetune
from lora2serve.training import model as models
from lora2serve.weights.dequantize import Dequantized
from tests.support.runs import DEMO, Told, fit, logged, recipe_file

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, chats: dict[str, str]) -> tuple[Run, Told]:
    file = recipe_file(tmp_path_factory.mktemp("qlora"), DEMO / "base", chats, steps=12, eval_steps=4)
    run, told, _ = fit(file)
    return run, told


def held_out_loss(run: Run, *, four_bit: bool, adapter: bool, scale: float = 1.0) -> float:
    """Mean loss over the labeled tokens of the held-out rows, one row at a time and without any padding."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        DEMO / "base", dtype=torch.float32, quantization_config=config if four_bit else None
    )
    if adapter:
        model = PeftModel.from_pretrained(model, run.adapter)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: value * scale for name, value in module.scaling.items()}
    if four_bit:
        from lora2serve.weights.bnb.cpu import use_plain_cpu_kernels

        use_plain_cpu_kernels(model)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    total, count = 0.0, 0
    for line in run.eval_data.read_text().splitlines():
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            json.loads(line)["messages"][:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            told = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        answer = torch.tensor(ids[len(prompt) :])
        total -= float(told[torch.arange(len(answer)), answer].sum())
        count += len(answer)
    return total / count


def test_the_run_directory_is_whole(trained: tuple[Run, Told]) -> None:
    run, told = trained
    there = {path.name for path in run.path.iterdir()}
    assert there >= {"recipe.yaml", "run.json", "adapter", "eval.jsonl", "metrics.jsonl", "loss.png", "checkpoints"}
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in run.adapter.iterdir()} >= {"adapter_model.safetensors", "tokenizer.json"}
    assert told.bars["train"] == [12, 12]
    last = f"loss {logged(run)[12]:.4f}, eval loss {logged(run, 'eval_loss')[12]:.4f}"
    assert re.fullmatch(re.escape(last) + r", [\d,]+ tokens/s", told.said["train"]), "beside the bar"
    assert f"step 12 of 12: {last}" in told.notes
    assert f"step 6 of 12: loss {logged(run)[6]:.4f}" in told.notes, "without the eval loss of an earlier step"


def test_loss_of_every_step_is_kept_and_falls(trained: tuple[Run, Told]) -> None:
    run, _ = trained
    loss, held_out = logged(run), logged(run, "eval_loss")
    assert list(loss) == list(range(1, 13))
    assert list(held_out) == [4, 8, 12]
    assert sum(list(loss.values())[-3:]) < 0.8 * sum(list(loss.values())[:3])


def test_the_picture_starts_at_the_base(trained: tuple[Run, Told], tmp_path: Path) -> None:
    from PIL import Image

    from lora2serve.training import plot

    run, _ = trained
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    evaluated = plot._evaluated(run, lines)
    assert evaluated == [(0, run.record.metrics.base.eval_loss), *logged(run, "eval_loss").items()]
    assert plot.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert plot.smooth([1.0] * 50 + [0.0] * 50)[-1] < 0.01 < 0.5 < plot.smooth([1.0] * 50 + [0.0] * 50)[51]
    with Image.open(run.path / "loss.png") as image:
        colors = {color for count, color in image.convert("RGB").getcolors(1 << 20) if count > 50}
    assert {(31, 119, 180), (255, 127, 14)} <= colors, "both curves are there"
    empty = Run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train_runtime": 1.0}\n')
    plot.plot(empty)
    with Image.open(tmp_path / "loss.png") as image:
        assert (255, 127, 14) not in {color for _, color in image.convert("RGB").getcolors(1 << 20)}, "the control"


def test_evaluated_before_and_after_and_on_the_original_base(trained: tuple[Run, Told]) -> None:
    run, told = trained
    metrics = run.record.metrics.measured()
    found = {name: metrics[name].eval_loss for name in ("base", "tuned", "tuned_on_original")}
    expected = {
        "base": held_out_loss(run, four_bit=True, adapter=False),
        "tuned": held_out_loss(run, four_bit=True, adapter=True),
        "tuned_on_original": held_out_loss(run, four_bit=False, adapter=True),
    }
    for name, loss in expected.items():
        assert found[name] == pytest.approx(loss, abs=2e-5), name
        assert metrics[name].perplexity == pytest.approx(2.718281828459045 ** found[name])
    assert found["tuned"] < found["base"] - 0.1
    assert abs(found["tuned"] - found["tuned_on_original"]) > 1e-4, "the control: the two bases can be told apart"
    wrong = held_out_loss(run, four_bit=True, adapter=True, scale=1.1)
    assert abs(wrong - found["tuned"]) > 1e-3, "the control: alpha times 1.1"
    assert any(f"base: eval loss {found['base']:.4f}" in note for note in told.notes)
    assert sum("perplexity" in note for note in told.notes) == 3
    apart = metrics_apart(run)
    assert apart.mean == pytest.approx(expected["tuned"] - expected["tuned_on_original"], abs=2e-5)
    assert apart.low < apart.mean < apart.high
    assert apart.rows == 8


def metrics_apart(run: Run) -> LossDifference:
    """What `--merge-base auto` decides by."""
    apart = run.record.metrics.tuned_less_tuned_on_original
    assert apart is not None
    return apart


def test_adapter_is_float32_and_has_learned(trained: tuple[Run, Told]) -> None:
    run, _ = trained
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not any(torch.equal(t, t.bfloat16().float()) for t in tensors.values()), "never rounded to bfloat16 either"
    learned = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.abs().max() > 1e-4]
    assert len(learned) == 7 * 3, "seven linear layers in each of three blocks"


def test_what_was_quantized_is_written_down(trained: tuple[Run, Told]) -> None:
    kept = trained[0].record.quantization
    assert (kept.type, kept.double_quant, kept.compute_dtype) == ("nf4", True, "float32")
    assert len(kept.modules) == 7 * 3
    assert "lm_head" not in kept.modules


def test_identity_of_base_and_data_is_kept(trained: tuple[Run, Told], chats: dict[str, str]) -> None:
    import hashlib

    record = trained[0].record
    assert record.data.train.sha256 == hashlib.sha256(Path(chats["train"]).read_bytes()).hexdigest()
    assert (record.data.train.rows, record.data.eval.rows) == (24, 8)
    assert record.base.path == str(DEMO / "base")
    assert (record.steps, record.device, record.finished) == (12, "cpu", True)


def test_the_seed_decides(trained: tuple[Run, Told], tmp_path: Path, chats: dict[str, str]) -> None:
    again, _, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", chats, steps=12, eval_steps=4))
    assert logged(again) == logged(trained[0])
    other, _, _ = fit(recipe_file(tmp_path / "b", DEMO / "base", chats, steps=2, seed=7))
    assert logged(other)[1] != logged(again)[1], "the control: other rows come first"


def test_no_quantization(tmp_path: Path, chats: dict[str, str]) -> None:
    run, _, _ = fit(recipe_file(tmp_path, DEMO / "base", chats, steps=3, quantize="none"))
    assert run.record.quantization is None
    assert run.record.metrics.tuned_on_original is None
    assert run.record.metrics.tuned.eval_loss == pytest.approx(
        held_out_loss(run, four_bit=False, adapter=True), abs=2e-5
    )


def test_a_full_base_that_does_not_fit_is_said_so(
    tmp_path: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora2serve.exporting.open_model import decide_merge_base
    from lora2serve.training import eval_loss

    monkeypatch.setattr(
        eval_loss, "_free_memory", lambda where: 1.2 * 2 * (DEMO / "base/model.safetensors").stat().st_size - 1
    )
    run, told, _ = fit(recipe_file(tmp_path / "a", DEMO / "base", chats, steps=1))
    assert run.record.metrics.tuned_on_original is None
    assert any("does not fit: the adapter was not measured on it" in note for note in told.notes)
    assert decide_merge_base(run.record, "auto")[0] == "original"
    monkeypatch.setattr(
        eval_loss, "_free_memory", lambda where: 1.2 * 2 * (DEMO / "base/model.safetensors").stat().st_size + 1
    )
    fits, _, _ = fit(recipe_file(tmp_path / "b", DEMO / "base", chats, steps=1))
    assert fits.record.metrics.tuned_on_original, "the control"


def test_a_base_that_is_quantized_already(tmp_path: Path, chats: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "base" / name).write_bytes((DEMO / "base" / name).read_bytes())
    run, _, _ = fit(recipe_file(tmp_path, tmp_path / "base", chats, steps=2))
    assert (run.record.quantization.type, run.record.quantization.double_quant) == ("nf4", False)
    assert run.record.metrics.tuned_on_original is None, "its full-precision weights are not here"
    from lora2serve.weights.checkpoint import Checkpoint

    names = {spec.name.removesuffix(".weight") for spec in Dequantized(Checkpoint(tmp_path / "base")).specs()}
    assert set(run.record.quantization.modules) <= names


@pytest.mark.parametrize(
    ("cuda", "bf16", "expected"),
    [(False, True, ("cpu", "float32")), (True, True, ("cuda", "bfloat16")), (True, False, ("cuda", "float16"))],
)
def test_compute_type_by_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, bf16: bool, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)
    where = models.device()
    assert (where.name, where.dtype) == expected


def test_bfloat16_as_on_a_gpu(
    trained: tuple[Run, Told], chats: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type that a GPU computes in, on this CPU: the same losses as in float32, to what bfloat16 can tell apart."""
    monkeypatch.setattr(finetune, "device", lambda: models.Device("cpu", "bfloat16"))
    run, _, _ = fit(recipe_file(tmp_path, DEMO / "base", chats, steps=12, eval_steps=4))
    assert run.record.quantization.compute_dtype == "bfloat16"
    loss, expected = logged(run), logged(trained[0])
    for step, value in expected.items():
        assert loss[step] == pytest.approx(value, abs=0.05), step
    assert loss != expected, "the control: it was another type"
    for name in ("base", "tuned", "tuned_on_original"):
        found, known = (each.record.metrics.measured()[name].eval_loss for each in (run, trained[0]))
        assert found == pytest.approx(known, abs=0.03), name
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not any(torch.equal(t, t.bfloat16().float()) for t in tensors.values()), "never rounded to bfloat16"


@pytest.mark.parametrize(("computed", "kept"), [("bfloat16", torch.bfloat16), ("float16", torch.float32)])
def test_what_is_not_quantized_takes_no_more_memory_than_it_needs(computed: str, kept: torch.dtype) -> None:
    from lora2serve.config.recipe import TrainRecipe

    base = models.load_base(DEMO / "base", TrainRecipe(), models.Device("cpu", computed))
    model = models.prepare(base, checkpointing=True)
    norms = [module.weight for name, module in model.named_modules() if name.endswith("norm")]
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight, *norms):
        assert weight.dtype == kept


def test_compute_type_reaches_bitsandbytes(trained: tuple[Run, Told], small: Path) -> None:
    import bitsandbytes as bnb

    from lora2serve.config.recipe import TrainRecipe

    model = models.load_base(small, TrainRecipe(double_quant=False), models.device())
    layers: list[Any] = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert {layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}
    assert not any(layer.weight.quant_state.nested for layer in layers)
