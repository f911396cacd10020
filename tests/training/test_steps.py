"""However a step is done, its gradient is that of the plain way: in parts, compiled, without padding, with casts hoisted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import LoopRecord
from lora2serve.errors import TrainError
from lora2serve.training import finetune
from lora2serve.training.adapter_casts import AdapterCasts
from lora2serve.training.batch_parts import Batch, parts
from lora2serve.training.checkpoints import last_checkpoint
from lora2serve.training.layer_compilation import CompiledLayers, is_refusal
from lora2serve.training.loop_choice import in_parts
from lora2serve.training.packing import attend_by_document
from lora2serve.training.row_collator import RowCollator
from lora2serve.training.step_attempts import StepAttempts
from lora2serve.training.varlen_attention import apart
from tests.support.families import make_family
from tests.support.runs import fit, logged, recipe_file
from tests.training.test_packing import documents

pytestmark = pytest.mark.engine

FIVE = ("llama", "qwen3", "gemma3_text", "mistral", "phi3", "phi")  # and one Phi more
LENGTHS = (17, 40, 3, 25, 30, 9)


def tuned(kind: str, *, checkpointing: bool = False, **changes: Any) -> Any:
    """A random model with a LoRA on all linear layers, whose B is random, ready to train by TRL's fused head."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    model = make_family(kind, **changes)
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    inner = adapted.get_base_model()
    add_fused_lm_head(inner, outputs=("log_probs",))
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.enable_input_require_grads()
    return adapted.train()


def batch(*lengths: int, free: bool = False, multiple: int | None = None) -> dict[str, Any]:
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in documents(*lengths, seed=6)]
    collator = RowCollator(pad_token_id=0, padding_free=free, pad_to_multiple_of=multiple, longest=max(lengths))
    made: dict[str, Any] = collator(rows)
    return made


def backward(model: Any, items: int) -> Callable[[Batch], Tensor]:
    """The loss of a part and its gradients, as the trainer takes them."""

    def run(part: Batch) -> Tensor:
        inputs = {name: value for name, value in part.items() if name != "padding"}
        loss: Tensor = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum() / items
        loss.backward()
        return loss.detach()

    return run


def gradients(model: Any) -> dict[str, Tensor]:
    """And none from now on."""
    named = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    assert named
    return named


def plain(model: Any, whole: Batch, items: int = 100) -> dict[str, Tensor]:
    backward(model, items)(whole)
    return gradients(model)


def furthest(ones: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Of the largest gradient."""
    assert ones.keys() == others.keys()
    largest = max(float(gradient.abs().max()) for gradient in others.values())
    return max(float((ones[name] - others[name]).abs().max()) for name in ones) / largest


def refuse_more_than(model: Module, tokens: int) -> None:
    """A real lack of memory, where more than ``tokens`` go through the model at once."""

    def claim(_: Module, values: object, options: dict[str, Any]) -> None:
        if options["input_ids"].numel() > tokens:
            torch.empty(1 << 50)

    model.register_forward_pre_hook(claim, with_kwargs=True)


class Room:
    """What a ``StepAttempts`` tells and asks for."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.words: list[str] = []
        self.counts: list[int] = []
        self.model = model
        self.attempts = StepAttempts(self.words.append, self.counts.append, **options)

    def step(self, batches: Iterable[Batch], items: int = 100) -> dict[str, Tensor]:
        for each in batches:
            self.attempts.loss(each, backward(self.model, items), self.model.zero_grad)
        self.attempts.batches.clear()
        return gradients(self.model)


@pytest.mark.parametrize("kind", FIVE)
@pytest.mark.parametrize("free", [False, True])
def test_parts_have_the_gradient_of_the_whole(kind: str, free: bool) -> None:
    model = tuned(kind)
    whole = batch(*LENGTHS, free=free)
    expected = plain(model, whole)
    assert sum(1 for _ in parts(whole, 3)) >= 3
    for part in parts(whole, 3):
        backward(model, 100)(part)
    assert furthest(gradients(model), expected) < 1e-6
    for part in list(parts(whole, 3))[:-1]:
        backward(model, 100)(part)
    assert furthest(gradients(model), expected) > 1e-4, "the control: one part is missing"


@pytest.mark.parametrize("free", [False, True])
def test_out_of_memory_halves_the_batch_and_keeps_the_gradient_of_the_step(free: bool) -> None:
    """In the second of two batches, when gradients of the first are there already."""
    model = tuned("llama")
    batches = [batch(9, 9, 9, 9, free=free), batch(*LENGTHS[:4], free=free)]
    for each in batches:
        backward(model, 100)(each)
    expected = gradients(model)
    refuse_more_than(model, 70)
    room = Room(model)
    assert furthest(room.step(batches), expected) < 1e-6
    assert room.counts == [2, 4][: len(room.counts)] and room.counts
    assert furthest(room.step(batches), expected) < 1e-6 and len(room.counts) == room.attempts.count // 2, "it stays so"


def test_nothing_is_left_to_change() -> None:
    model = tuned("llama")
    refuse_more_than(model, 20)
    asked: list[str] = []
    room = Room(model, recompute=lambda: asked.append("recompute"))
    with pytest.raises(TrainError, match="out of memory with one row at once") as refused:
        room.step([batch(30, 30)])
    assert room.counts == [2] and asked == ["recompute"] and "data.max_length" in refused.value.hint
    assert room.words == ["out of memory with one row at once: activations are computed twice from now on"]
    with pytest.raises(RuntimeError, match="must match the size"):  # the control: what is no lack of memory
        room.attempts.loss({**batch(8), "labels": torch.zeros(1, 3, dtype=torch.long)}, backward(model, 1), print)


def test_rows_of_a_step_stay() -> None:
    loop = LoopRecord("adamw_torch_fused", True, rows=8, accumulation=3)
    assert [(in_parts(loop, count).rows, in_parts(loop, count).accumulation) for count in (2, 4, 8)] == [
        (4, 6), (2, 12), (1, 24)
    ]  # fmt: skip
    assert in_parts(replace(loop, rows=5, accumulation=1), 2).rows == 1


GRAPHS = [
    pytest.param(kind, checkpointing, marks=() if (kind, checkpointing) == ("llama", True) else pytest.mark.slow)
    for kind in FIVE for checkpointing in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "checkpointing"), GRAPHS)
def test_layers_are_one_graph(kind: str, checkpointing: bool) -> None:
    """For several kinds of layers, numbers of rows and lengths; without a compiler, which is another test's."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tuned(kind, checkpointing=checkpointing)
    shapes = [(17, 140, 3), (200, 250), (64, 64, 64)]  # no length is one of the model's sizes at first
    layers = CompiledLayers(model.get_base_model(), backend="eager")
    for lengths in shapes:
        whole = batch(*lengths, multiple=64)
        expected = plain(model, whole)
        with layers.on():
            found = plain(model, whole)
        assert furthest(found, expected) < 1e-5
    assert not counters["graph_break"]
    kinds = len(set(getattr(model.config, "layer_types", None) or ["full_attention"]))
    graphs = counters["stats"]["unique_graphs"]
    assert kinds <= graphs <= kinds + 2, graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIVE)
def test_compiled_layers_have_the_same_gradient(kind: str) -> None:
    torch._dynamo.reset()
    model = tuned(kind, checkpointing=True)
    layers = CompiledLayers(model.get_base_model())
    for lengths in ((17, 40, 3), (60, 20, 9)):
        whole = batch(*lengths, multiple=64)
        expected = plain(model, whole)
        with layers.on():
            found = plain(model, whole)
        assert 0 < furthest(found, expected) < 1e-5, "the control: other kernels round otherwise"


def test_a_layer_that_cannot_be_compiled_runs_as_it_is() -> None:
    torch._dynamo.reset()
    model = tuned("llama")
    whole = batch(9, 12)
    expected = plain(model, whole)
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda *_: print(end="", file=open("/dev/null", "w")))  # noqa: SIM115
    room = Room(model, compiled=CompiledLayers(model.get_base_model(), backend="eager"))
    assert furthest(room.step([whole]), expected) == 0
    assert room.attempts.compiled is None and room.words[0].startswith("layers are not compiled: ")
    assert not is_refusal(ValueError("another"))


@pytest.mark.parametrize("kind", FIVE)
def test_rows_without_padding_have_the_same_gradient(kind: str) -> None:
    """Beside padded rows, and beside one row under a mask; windows are shorter than rows."""
    model = tuned(kind)
    padded = plain(model, batch(*LENGTHS))
    masked = plain(model, batch(*LENGTHS, free=True))
    assert attend_by_document(model, documents(30, 9, 21))
    free = batch(*LENGTHS, free=True, multiple=64)
    assert free["padding"] == 4 and free["input_ids"].shape == (1, 128)
    with apart():
        found = plain(model, free)
        together = plain(model, batch(sum(LENGTHS), free=True))
    assert furthest(found, padded) < 1e-5 and furthest(found, masked) < 1e-5
    assert furthest(together, padded) > 1e-4, "the control: one document"
    assert furthest(plain(model, batch(*LENGTHS)), padded) == 0, "padded rows go their own way"
    assert furthest(plain(model, batch(*LENGTHS, free=True)), masked) == 0, "and so does all else, without the word"


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_5_text", "deepseek_v3"])
def test_what_attends_otherwise_is_left_alone(kind: str) -> None:
    model = make_family(kind)
    before = model.config._attn_implementation
    if kind != "deepseek_v3":  # whose heads have two sizes: the model is asked
        assert not attend_by_document(model, documents(30, 9, 21))
        assert model.config._attn_implementation == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hoisted_casts_are_autocasts(checkpointing: bool) -> None:
    """To the last bit, and into the same float32 weights."""
    model = tuned("llama", checkpointing=checkpointing)
    model.get_base_model().model.to(torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if "lora_" in name else weight.data.bfloat16()
    whole = batch(*LENGTHS)
    casts = AdapterCasts(model, torch.bfloat16)
    found = {}
    for name, around in {"autocast": nullcontext, "hoisted": casts.on}.items():
        with around(), torch.autocast("cpu", torch.bfloat16):
            loss = -model(**whole, use_cache=False, fused_lm_head=True).log_probs.sum() / 100
            loss.backward()
        found[name] = gradients(model)
        assert all(gradient.dtype == torch.float32 for gradient in found[name].values())
    assert furthest(found["hoisted"], found["autocast"]) == 0
    assert all(weight.dtype == torch.float32 for name, weight in model.named_parameters() if "lora_" in name)


def with_little_memory(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Every model that training makes has no room for more."""
    own = finetune.add_adapter

    def add(*values: Any) -> Any:
        model = own(*values)
        refuse_more_than(model.get_base_model(), tokens)
        return model

    monkeypatch.setattr(finetune, "add_adapter", add)


def test_a_run_with_little_memory(
    tmp_path: Path, small: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trains the same, says so, and resumes with what fits."""
    options: dict[str, Any] = {"steps": 4, "batch_size": 4, "accumulation": 2, "quantize": "none"}
    data = {"train": chats["train"]}
    whole, _, _ = fit(recipe_file(tmp_path / "a", small, data, **options))
    with_little_memory(monkeypatch, 128)
    run, told, _ = fit(recipe_file(tmp_path / "b", small, data, **options))
    assert "out of memory with 4 rows at once: 2 from now on, in the same optimizer steps" in told.warnings
    assert run.record.loop and (run.record.loop.rows, run.record.loop.accumulation) in {(2, 4), (1, 8)}
    assert whole.record.loop and (whole.record.loop.rows, whole.record.loop.accumulation) == (4, 2)
    for key in ("loss", "grad_norm"):
        assert list(logged(run, key).values()) == pytest.approx(list(logged(whole, key).values()), abs=1e-4)
    assert logged(run, "num_tokens") == logged(whole, "num_tokens")


def compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    own = finetune.choose_loop
    monkeypatch.setattr(
        finetune, "choose_loop", lambda *values, **options: replace(own(*values, **options), compiled=True)
    )


@pytest.mark.slow
def test_a_compiled_run_is_resumed_to_the_last_bit(
    tmp_path: Path, small: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_loop(monkeypatch)
    file = recipe_file(tmp_path, small, {"train": chats["train"]}, steps=6, lora={"dropout": 0.1})
    torch._dynamo.reset()
    whole, told, _ = fit(file, into=tmp_path / "whole")
    assert not [word for word in told.warnings if "compiled" in word]
    cut = Run(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    shutil.rmtree(cut.adapter)
    newest = last_checkpoint(cut)
    assert newest is not None
    shutil.rmtree(newest)
    cut.save(replace(cut.record, finished=False))
    torch._dynamo.reset()
    fit(file, into=cut.path, resume=True)
    ones, others = (load_file(each.adapter / "adapter_model.safetensors") for each in (whole, cut))
    assert all(torch.equal(ones[name], others[name]) for name in ones)
    assert logged(whole) == logged(cut) and whole.record.loop == cut.record.loop


def test_a_run_of_an_earlier_release_goes_on_as_it_began(tmp_path: Path, small: Path, chats: dict[str, str]) -> None:
    file = recipe_file(tmp_path, small, {"train": chats["train"]}, steps=4)
    whole, _, _ = fit(file)
    expected: Sequence[float] = list(logged(whole).values())
    shutil.rmtree(whole.adapter)
    newest = last_checkpoint(whole)
    assert newest is not None
    shutil.rmtree(newest)
    whole.save(replace(whole.record, loop=None, finished=False))
    fit(file, resume=True)
    assert list(logged(whole).values()) == expected
    assert whole.record.loop == LoopRecord("adamw_torch", True, 4, 1, compiled=False, varlen=False)
