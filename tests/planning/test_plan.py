"""``lora2serve.plan`` and its command: what is asked, what is shown, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import lora2serve
from lora2serve.api.memory_check import refuse_too_large
from lora2serve.cli import run
from lora2serve.config.recipe import find, load
from lora2serve.errors import CheckpointError, TrainError, UsageError
from lora2serve.planning.gpus import find_gpu, gpu_of_driver
from lora2serve.planning.measured_memory import measured_file, measured_ratio, record_measured
from lora2serve.planning.memory_plan import fits, levers, planned_bytes
from lora2serve.planning.model_shape import ExpertShape, model_shape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import target_experts
from tests.planning.conftest import LLAMA3_8B, LLAMA3_70B, write_config
from tests.support.runs import Told

GIB = 1 << 30


def test_parts_and_combinations(llama_8b: Path) -> None:
    plan = lora2serve.plan(llama_8b, gpu="4090", ranks=[8, 64], targets=["qv", "q_proj+down_proj"], batch=1)
    assert [(item.method, item.rank, item.targets) for item in plan.trainings] == [
        ("full", None, None),
        *((method, rank, targets) for method in ("lora", "qlora") for rank in (8, 64)
          for targets in ("qv", ("q_proj", "down_proj"))),
    ]  # fmt: skip
    for training in plan.trainings:
        assert training.bytes.total == sum(vars(training.bytes).values())
    full, qlora = plan.trainings[0], plan.trainings[5]
    assert full.trainable == plan.parameters and full.largest_batch == 0 and "RTX 4090" not in full.fits
    assert qlora.trainable == 8 * 32 * (4096 + 4096 + 4096 + 1024)
    assert "RTX 4090" in qlora.fits and qlora.largest_batch
    assert plan.shares["qv"] < plan.shares["attention"] < plan.shares["all-linear"]
    assert plan.disk["base"] == 2 * plan.parameters and plan.time == "not measured"


def test_experts_that_are_not_there() -> None:
    """As a training says it; none of the names is passed over."""
    dense = model_shape(LLAMA3_8B, None)
    mixture = replace(dense, experts=(ExpertShape("model.layers.0.mlp.experts.down_proj", 8, 64, 64),))
    for shape, wanted, problem in (
        (dense, "experts", "this model has no experts in one tensor a layer"),
        (mixture, ("experts.down_proj", "experts.up"), r"no weight 'experts.up' of experts in this model$"),
    ):
        with pytest.raises(UsageError, match=f"train.lora.target_parameters: {problem}"):
            target_experts(shape, PlanSettings(target_parameters=wanted))
    for wanted in ("experts", ("experts.down_proj",)):
        assert target_experts(mixture, PlanSettings(target_parameters=wanted)) == list(mixture.experts)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    shape, settings = model_shape(LLAMA3_8B, None), PlanSettings(batch=1)
    gpu = find_gpu("24")
    rows = lora2serve.planning.memory_plan.largest_batch(shape, settings, gpu)
    sizes = [planned_bytes(shape, PlanSettings(batch=batch)).total for batch in (rows, rows + 1)]
    assert [fits(size, gpu) for size in sizes] == [True, False]


def test_levers_name_the_way_out(tmp_path: Path) -> None:
    """70B on 24 GB: nothing short of a larger card; 8B without quantization on 16 GB: QLoRA."""
    path = write_config(tmp_path / "70b", LLAMA3_70B)
    plan = lora2serve.plan(path, gpu="24", methods=["qlora"])
    assert plan.trainings[0].largest_batch == 0 and plan.trainings[0].fits[0] in ("H100", "A100 80GB", "RTX PRO 6000")
    lora = lora2serve.plan(path, methods=["lora"], batch=4).trainings[0]
    changes = [lever.change.partition(":")[0] for lever in lora.levers]
    assert changes[:2] == ["train.gradient_checkpointing", "train.batch_size"] and "train.quantize" in changes
    assert all(lever.total < lora.bytes.total and lever.price for lever in lora.levers)
    shape = model_shape(LLAMA3_8B, None)
    dpo, kto = (levers(shape, PlanSettings(batch=4, objective=objective)) for objective in ("dpo", "kto"))
    assert [any(lever.change.startswith("train.batch_size: 1,") for lever in found) for found in (dpo, kto)] == [
        True, False,
    ], "a recipe of kto with one row is refused"  # fmt: skip


@pytest.mark.parametrize(
    ("text", "gib"),
    [("24", 24), ("16GB", 16), ("4090", 24), ("RTX 4090", 24), ("h100", 80), ("A100-40", 40), ("nvidia H200", 140)],
)
def test_gpus_by_name(text: str, gib: int) -> None:
    assert find_gpu(text).memory / GIB == pytest.approx(gib, rel=0.03)


def test_unknown_gpus_and_drivers() -> None:
    with pytest.raises(UsageError, match=r"--gpu 4900: unknown.*did you mean '4090'"):
        find_gpu("4900")
    assert gpu_of_driver("Tesla T4", "15360 MiB").dtype == "float16"
    assert gpu_of_driver("Tesla V100-SXM2-16GB", "16384 MiB").dtype == find_gpu("v100").dtype == "float16"
    assert gpu_of_driver("NVIDIA A100-SXM4-40GB", "40960 MiB").dtype == find_gpu("a100").dtype == "bfloat16"
    assert gpu_of_driver("NVIDIA H100 80GB HBM3", "81559 MiB").memory == 81559 << 20


def test_what_is_refused(llama_8b: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--method qlaro: unknown.*did you mean 'qlora'"):
        lora2serve.plan(llama_8b, methods=["qlaro"])
    with pytest.raises(UsageError, match=r"targets 'atention'.*did you mean 'attention'"):
        lora2serve.plan(llama_8b, targets=["atention"])
    with pytest.raises(UsageError, match="--set changes a recipe, and a model was named"):
        lora2serve.plan(llama_8b, overrides=["train.lora.rank=4"])
    write_config(tmp_path / "odd", {"model_type": "odd"})
    with pytest.raises(CheckpointError, match="a model of type 'odd' without the headers"):
        lora2serve.plan(tmp_path / "odd")


def test_the_command(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(llama_8b), "--method", "qlora", "--rank", "32", "--batch", "2", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    keys = ("method", "rank", "targets", "batch", "length")
    assert tuple(item[key] for key in keys) == ("qlora", 32, "all-linear", 2, 1024)
    assert item["bytes"]["total"] == sum(size for part, size in item["bytes"].items() if part != "total")
    assert run(["plan", str(llama_8b), "--gpu", "a100"]) == 0
    text = capsys.readouterr().out
    assert "weights" in text and "4-bit state" in text and "rows on A100 80GB" in text and "not measured" in text

    assert run(["plan", str(llama_8b), "--rank", "many"]) == 2


def test_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", "--set", "train.lora.rank=8", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert (item["method"], item["rank"], item["batch"], item["length"]) == ("qlora", 8, 16, 128)


def test_a_recipe_for_a_known_gpu(tmp_path: Path) -> None:
    """What training would take at once there; a number of rows that is asked for stays."""
    write_config(tmp_path / "base", LLAMA3_8B)
    recipe = tmp_path / "lora2serve.yaml"
    recipe.write_text(json.dumps({"model": {"path": "base"}, "data": {"train": "rows.jsonl", "eval_split": 0}}))
    plans = {gpu: lora2serve.plan(recipe, gpu=gpu).trainings[0] for gpu in ("h100", "24", "10")}
    found = {gpu: (plan.batch, plan.checkpointing) for gpu, plan in plans.items()}
    assert found == {"h100": (8, False), "24": (8, True), "10": (4, True)}
    assert lora2serve.plan(recipe, gpu="10", batch=8).trainings[0].batch == 8


@pytest.mark.engine
def test_a_training_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its base is fetched, with the first change that would fit; a plan that cannot be made stops nothing."""
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(json.dumps({"prompt": "a", "completion": "b"}) for _ in range(4))
    (tmp_path / "rows.jsonl").write_text(rows)
    write_config(tmp_path / "base", LLAMA3_8B)
    recipe = {"model": {"path": "base"}, "data": {"train": "rows.jsonl", "eval_split": 0}}
    (tmp_path / "lora2serve.yaml").write_text(json.dumps(recipe))
    with pytest.raises(TrainError, match=r"base: this training takes 7\.\d GB, and 7 GiB has 7\.5 GB") as refused:
        lora2serve.train(gpu="7")
    assert "the first change that fits: train.lora.rank: 8" in refused.value.hint, "it is one row at once already"
    with pytest.raises(TrainError, match=r"and 4 GiB has 4\.3 GB") as refused:
        lora2serve.train(gpu="4")
    assert "no single change fits" in refused.value.hint and "RTX 4070" in refused.value.hint
    for gpu in ("80", "10"):  # the control: it got that far, on the smaller one with less at once
        with pytest.raises(TrainError, match="no tokenizer that transformers can load"):
            lora2serve.train(gpu=gpu)
    assert not (tmp_path / "runs").exists()


def test_targets_that_the_plan_does_not_know_stop_no_training(llama_8b: Path) -> None:
    """PEFT adapts embeddings, too: such a training passes, after a note. The control: without them it is too large."""
    values = [f"model.path={llama_8b}", 'train.lora.targets=["q_proj","embed_tokens"]']
    told = Told()
    refuse_too_large(load(find("demo"), values), "4", told)
    assert told.notes == ["memory not planned: targets 'embed_tokens': no linear layer of this model"]
    with pytest.raises(TrainError, match="4 GiB has"):
        refuse_too_large(load(find("demo"), [*values, 'train.lora.targets=["q_proj"]']), "4", told)


def test_a_cache_folder_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert record_measured("T4", 100, 101).endswith(
        "Not a directory, so the next plan does not count what this run took"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert record_measured("T4", 100, 101) == "" and measured_ratio("T4") == (1.01, 1)


def test_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "demo", "--dry-run", "--gpu", "4090"]) == 0
    assert "rows on RTX 4090" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert run(["train", "--resume", "--dry-run"]) == 2


def test_a_dry_run_refuses_rows_that_training_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": 5}\n')
    words = ["train", "demo", "--dry-run", "--gpu", "4090", "--set"]
    for value, said in (
        (tmp_path / "none.jsonl", "none.jsonl: No such file"), (tmp_path / "bad.jsonl", "1 of 1 rows cannot be used"),
    ):  # fmt: skip
        assert run([*words, f"data.train={value}", "--set", "data.eval=null"]) == 1
        shown = capsys.readouterr()
        assert said in shown.err and not shown.out
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    good = [*words, f"data.train={tmp_path / 'good.jsonl'}"]
    assert run([*good, "--set", "data.eval=null"]) == 0, capsys.readouterr().err
    assert run([*good, "--set", f"data.eval={tmp_path / 'bad.jsonl'}"]) == 1
    assert "bad.jsonl:1" in capsys.readouterr().err
    preference = [f"--set=train.objective={'dpo'}", "--set=data.packing=false", "--set=train.lora.dropout=0"]
    assert run([*good, "--set", "data.eval=null", *preference]) == 1, "answers that are not compared"
    assert "2 of 2 rows cannot be used" in capsys.readouterr().err
    assert run([*words, "data.train=somebody/rows-to-fetch", "--set", "data.eval=null"]) == 0, "which is not fetched"


def test_runs_on_this_machine_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured_ratio("T4") == (1.0, 0)
    for planned, measured in ((100, 90), (100, 104), (100, 900), (0, 1)):
        record_measured("T4", planned, measured)
    record_measured("H100", 100, 120)
    with measured_file().open("a") as file:
        file.write("damaged\n[]\n")
    assert measured_ratio("T4") == (1.04, 2)
    shape, settings = model_shape(LLAMA3_8B, None), PlanSettings()
    plain, larger = (planned_bytes(shape, settings, ratio) for ratio in (1.0, 1.04))
    assert larger.tensors == plain.tensors and larger.total == plain.total + round(0.04 * plain.tensors)
