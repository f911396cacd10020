"""bitsandbytes' CUDA kernels: QLoRA of a model of a billion parameters, its speed, memory and types."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.artifacts.run import Run
from lora2serve.training import finetune
from lora2serve.training import model as models
from lora2serve.training.checkpoints import last_checkpoint
from tests.support.runs import fit, logged, recipe_file

ROWS, LENGTH = 4, 512


def measured(file: Path, **options: Any) -> tuple[Run, float]:
    """Train; the run and its peak of GPU memory in GB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run, _, _ = fit(file, **options)
    return run, torch.cuda.max_memory_allocated() / 1e9


def write(folder: Path, base: Path, data: dict[str, str], **train: Any) -> Path:
    """Ten steps of four full rows, and no evaluation in between."""
    data = {key: value for key, value in data.items() if key != "eval"}
    options = {"steps": 10, "batch_size": ROWS, "learning_rate": 1e-3, "warmup": 0, **train}
    return recipe_file(folder, base, {**data, "max_length": LENGTH, "packing": False}, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, billion: Path, prose: dict[str, str]) -> tuple[Run, float]:
    return measured(write(tmp_path_factory.mktemp("qlora"), billion, prose, steps=20))


def test_speed_and_peak_memory(trained: tuple[Run, float], record_property: Callable[[str, object], None]) -> None:
    run, peak = trained
    assert list(logged(run)) == list(range(1, 21))
    tokens = logged(run, "num_tokens")[20] / logged(run, "train_runtime")[20]
    record_property("tokens_per_second", round(tokens))
    record_property("peak_gb", round(peak, 2))
    print(f"\n{torch.cuda.get_device_name()}: {tokens:,.0f} tokens/s, peak {peak:.2f} GB")
    # 0.53 GB of 4-bit weights, 0.26 GB of embeddings and head, 0.2 GB of adapter, gradients and AdamW; the rest are
    # activations of all layers: there is memory for them.
    assert peak < 12
    memory = run.record.memory
    assert memory and memory.planned_bytes and 0.95 <= memory.planned_bytes / memory.peak_bytes <= 1.1
    assert tokens > 200


def test_four_bits_take_less_memory_than_sixteen(
    trained: tuple[Run, float], tmp_path: Path, billion: Path, prose: dict[str, str]
) -> None:
    _, sixteen = measured(write(tmp_path, billion, prose, quantize="none"))
    assert trained[1] < sixteen - 0.5, "the control: 1.1e9 weights of 2 bytes against 0.5"


def test_it_learns_and_the_adapter_is_float32(trained: tuple[Run, float]) -> None:
    run, _ = trained
    loss = logged(run)
    assert loss[1] == pytest.approx(10.4, abs=0.6), "ln 32000: a random model guesses"
    assert loss[20] < loss[1] - 0.05
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not all(torch.equal(t, t.bfloat16().float()) for t in tensors.values()), "never rounded to bfloat16"
    assert len([name for name in tensors if "lora_B" in name]) == 22 * 7


def test_types_and_optimizer(trained: tuple[Run, float]) -> None:
    run, _ = trained
    kept = run.record.quantization
    expected = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    assert (run.record.device, kept.compute_dtype, kept.type) == ("cuda", expected, "nf4")
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert arguments.optim == "adamw_torch_fused", "there is memory for 1.1 billion parameters"
    assert (arguments.bf16, arguments.fp16) == (expected == "bfloat16", expected == "float16")
    assert not arguments.gradient_checkpointing
    state = torch.load(checkpoint / "optimizer.pt", weights_only=False, map_location="cpu")["state"]
    assert len(state) == 22 * 7 * 2
    assert {each["exp_avg"].dtype for each in state.values()} == {torch.float32}


def test_the_optimizer_is_paged(tmp_path: Path) -> None:
    """What TRL makes of ``paged_adamw_32bit``: bitsandbytes' AdamW with its states in managed memory."""
    import bitsandbytes as bnb

    weight = torch.nn.Parameter(torch.randn(1024, 1024, device="cuda"))  # smaller states stay where they are
    found = {}
    for paged in (True, False):
        optimizer = bnb.optim.AdamW([weight], lr=1e-4, is_paged=paged)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        found[paged] = getattr(optimizer.state[weight]["state1"], "is_paged", False)
    assert found == {True: True, False: False}


def test_gradient_checkpointing_saves_memory_and_changes_no_loss(
    trained: tuple[Run, float], tmp_path: Path, billion: Path, prose: dict[str, str]
) -> None:
    on, peak = measured(write(tmp_path, billion, prose, steps=2, gradient_checkpointing=True))
    assert peak < 0.8 * trained[1]
    assert logged(on)[1] == pytest.approx(logged(trained[0])[1], abs=0.02)


def test_evaluated_on_both_bases(tmp_path: Path, billion: Path, prose: dict[str, str]) -> None:
    data = {**prose, "max_length": LENGTH}
    run, _ = measured(recipe_file(tmp_path, billion, data, steps=15, learning_rate=1e-3, batch_size=ROWS))
    metrics = run.record.metrics
    assert metrics.tuned.eval_loss < metrics.base.eval_loss - 0.05
    assert metrics.tuned_on_original.eval_loss == pytest.approx(metrics.tuned.eval_loss, abs=0.3)


def test_float16_on_an_older_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, billion: Path, prose: dict[str, str]
) -> None:
    """Where there is no bfloat16: the gradient scaler needs the adapter in float32, and gets it."""
    monkeypatch.setattr(finetune, "device", lambda: models.Device("cuda", "float16"))
    run, _ = measured(write(tmp_path, billion, prose))
    loss = logged(run)
    assert run.record.quantization.compute_dtype == "float16"
    assert len(loss) == 10
    assert loss[10] < loss[1]


def test_resume_goes_on_where_it_was(tmp_path: Path, billion: Path, prose: dict[str, str]) -> None:
    file = write(tmp_path, billion, prose, steps=10, lora={"rank": 4})
    whole, _ = measured(file, into=tmp_path / "whole")
    cut = Run(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    shutil.rmtree(cut.adapter)
    newest = last_checkpoint(cut)
    assert newest is not None
    shutil.rmtree(newest)
    cut.save(replace(cut.record, finished=False))
    resumed, _ = measured(file, into=cut.path, resume=True)
    assert list(logged(resumed)) == list(range(1, 11))
    assert logged(resumed)[10] == logged(whole)[10]
    ones, others = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(ones[name], others[name]) for name in ones)


def test_packing_on_the_gpu(tmp_path: Path, billion: Path, prose: dict[str, str]) -> None:
    """The same rows in one step, packed or not: nobody sees a neighbor."""
    short = tmp_path / "short.jsonl"
    lines = [{"text": f"Row {number} speaks of {number * 7} things."} for number in range(8)]
    short.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": str(short), "max_length": 256}
    plain, _, _ = fit(recipe_file(tmp_path / "a", billion, data, steps=1, batch_size=8))
    packed, _, _ = fit(recipe_file(tmp_path / "b", billion, {**data, "packing": True}, steps=1, batch_size=8))
    assert logged(packed)[1] == pytest.approx(logged(plain)[1], abs=0.02)
