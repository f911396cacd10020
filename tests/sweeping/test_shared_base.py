"""Several adapters on one base in one process: each as it is alone, and none in the way of another."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.config import recipe as recipes
from lora2serve.data import data_sets
from lora2serve.errors import TrainError
from lora2serve.training.finetune import train
from lora2serve.training.model import device, load_base
from lora2serve.training.shared_base import SharedBase, SharedTraining, own_modules
from lora2serve.training.storage_tracker import StorageTracker
from lora2serve.training.turns import Turn, Turns
from tests.support.commands import RunningCommand, run_command
from tests.support.runs import Told, fit, logged, make_chat_model, recipe_file, uneven_data
from tests.support.tiny import make_adapter

pytestmark = pytest.mark.engine

FIGURES = ("loss", "grad_norm", "learning_rate", "num_tokens", "eval_loss")
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"steps": 7, "batch_size": 2, "accumulation": 2, "eval_steps": 3, "lora": {"dropout": 0.1}},
    "b": {"steps": 4, "batch_size": 3, "seed": 7, "save_best": True, "lora": {"dropout": 0.2, "rank": 4, "dora": True}},
    "c": {"steps": 5, "batch_size": 1, "seed": 8, "method": "ia3", "schedule": "linear"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("shared") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return uneven_data(tmp_path_factory.mktemp("rows"), 21, 6)


def write(folder: Path, base: Path, data: dict[str, str], names: str = "abc", **train: Any) -> list[Path]:
    """A recipe for each of these settings, in a folder of its own."""
    return [recipe_file(folder / name, base, data, **{**SETTINGS[name], **train}) for name in names]


def adapter(run: Run) -> dict[str, torch.Tensor]:
    (file,) = run.adapter.glob("adapter_model.safetensors")
    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors


def equal(run: Run, other: Run) -> bool:
    mine, theirs = adapter(run), adapter(other)
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def assert_same(run: Run, alone: Run) -> None:
    """Bit for bit."""
    assert equal(run, alone)
    for key in FIGURES:
        assert logged(run, key) == logged(alone, key), key
    assert run.record.metrics == alone.record.metrics
    assert run.record.steps == alone.record.steps and run.record.finished


def job(file: Path, shared: SharedBase, around: Callable[[], Any] | None = None) -> Callable[[Turn], None]:
    """The training of a recipe on a shared base."""

    def run(turn: Turn) -> None:
        recipe = recipes.load(file)
        folder = Run(file.parent / "shared")
        folder.path.mkdir()
        sets = data_sets.load(recipe.data, objective=recipe.train.objective)
        train(recipe, folder, sets, base=Path(recipe.model.path), progress=Told(), shared=SharedTraining(shared, turn))

    return run


def together(files: Sequence[Path], shared: SharedBase) -> list[Run]:
    ends = Turns(lambda: None).run([job(file, shared) for file in files])
    for end in ends:
        if end:
            raise end
    return [Run(file.parent / "shared") for file in files]


@pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_each_is_what_it_is_alone(tmp_path: Path, base: Path, data: dict[str, str], quantize: str) -> None:
    """Of other ranks, methods, seeds, rates, rows a step and lengths; and the base is as it was loaded."""
    files = write(tmp_path, base, data, "abc" if quantize == "none" else "ab", quantize=quantize)
    alone = [fit(file)[0] for file in files]
    shared = SharedBase()
    runs = together(files, shared)
    for run, other in zip(runs, alone, strict=True):
        assert_same(run, other)
    changed = fit(write(tmp_path / "control", base, data, "a", quantize=quantize, seed=1)[0])[0]
    assert not equal(changed, alone[0]), "the control"
    fresh, used = load_base(base, recipes.load(files[0]).train, device()), shared._model
    assert used is not None
    assert {name: value.tolist() for name, value in used.state_dict().items()} == {
        name: value.tolist() for name, value in fresh.state_dict().items()
    }


def test_modules_of_one_base_share_its_weights_only(base: Path, tmp_path: Path, data: dict[str, str]) -> None:
    """Parameters, buffers and quantization states are the same objects; modules and settings are not."""
    file = recipe_file(tmp_path, base, data)
    model = load_base(base, recipes.load(file).train, device())
    own = own_modules(model)
    mine, theirs = dict(model.named_parameters()), dict(own.named_parameters())
    assert list(mine) == list(theirs) and all(mine[name] is theirs[name] for name in mine)
    buffers = dict(own.named_buffers())
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    layers = [each.model.layers[0].self_attn.q_proj for each in (model, own)]
    assert layers[0].quant_state is layers[1].quant_state and layers[0].weight is layers[1].weight
    assert not {id(module) for module in model.modules()} & {id(module) for module in own.modules()}
    assert model.config is not own.config and own.model.layers[0].self_attn.config is own.config
    own.train()
    assert not model.training and own.training


def test_what_trains_the_base_itself_is_refused(base: Path, tmp_path: Path, data: dict[str, str]) -> None:
    """And leaves it frozen for the others; alone it is trained."""
    model_file = recipe_file(tmp_path / "a", base, data, quantize="none", method="boft", options={"bias": "all"})
    content = yaml.safe_load((base / "config.json").read_text())
    biased = make_chat_model(tmp_path / "biased", attention_bias=True)
    assert content["model_type"] == "llama"
    recipe = yaml.safe_load(model_file.read_text())
    recipe["model"]["path"] = str(biased)
    model_file.write_text(yaml.safe_dump(recipe))
    shared = SharedBase()
    with pytest.raises(TrainError, match="weights of the base itself"):
        together([model_file], shared)
    assert shared._model is not None and not any(each.requires_grad for each in shared._model.parameters())
    assert fit(model_file)[0].record.finished, "the control"


def measured(run: Callable[[StorageTracker], object]) -> int:
    """Peak of all tensors alive, in bytes."""
    tracker = StorageTracker()
    run(tracker)
    return tracker.peak


def test_peak_of_memory(tmp_path: Path, base: Path, data: dict[str, str]) -> None:
    """The base once, the state of each, and the activations of one step."""
    files = [
        recipe_file(tmp_path / name, base, data, quantize="none", steps=3, batch_size=4, seed=seed, lora={"rank": 32})
        for seed, name in enumerate("abc")
    ]

    def alone(tracker: StorageTracker) -> None:
        with tracker:
            fit(files[0])

    def shared(tracker: StorageTracker) -> None:
        def tracked(own: Callable[[Turn], None]) -> Callable[[Turn], None]:
            def run(turn: Turn) -> None:
                with tracker:
                    own(turn)

            return run

        base_of_all = SharedBase()
        assert Turns(lambda: None).run([tracked(job(file, base_of_all)) for file in files]) == [None] * 3

    weights = sum(value.nbytes for value in load_file(base / "model.safetensors").values())
    state = 3 * sum(value.nbytes for value in adapter(fit(files[0], into=tmp_path / "first")[0]).values())
    one, three = measured(alone), measured(shared)
    activations = one - weights - state
    assert activations > weights, "what is to be there once is not hidden by the rest"
    assert three <= weights + 3 * state + 1.1 * activations
    assert three > one + 2 * state - 0.1 * activations, "the control: the states of all are seen"


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory, base: Path, data: dict[str, str]) -> Path:
    """Recipes ``a.yaml`` and ``b.yaml``, and what each gives alone in ``alone/``."""
    folder = tmp_path_factory.mktemp("together")
    for file in write(folder / "alone", base, data, "ab", quantize="none", steps=14):
        content = {"name": file.parent.name, **yaml.safe_load(file.read_text())}
        (folder / f"{file.parent.name}.yaml").write_text(yaml.safe_dump(content))
        fit(file)
    return folder


def alone(folder: Path, name: str) -> Run:
    return Run(folder / "alone" / name / "run")


def test_one_that_fails_leaves_the_others(recipe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is none, and a loss that is no number: each is named, and the others are what they are alone."""
    monkeypatch.chdir(recipe_folder)
    content = yaml.safe_load(Path("a.yaml").read_text())
    Path("rows.jsonl").write_text('{"messages": 7}\n')
    bad_row = {**content, "name": "bad-row", "data": {"train": "rows.jsonl"}}
    start = make_adapter(recipe_folder / "start", Path(content["model"]["path"]))
    tensors = {name: value * 1e30 for name, value in load_file(start / "adapter_model.safetensors").items()}
    save_file(tensors, start / "adapter_model.safetensors")
    diverging = {**content, "name": "diverging", "train": {"quantize": "none", "steps": 14, "from_adapter": "start"}}
    for recipe in (bad_row, diverging):
        Path(f"{recipe['name']}.yaml").write_text(yaml.safe_dump(recipe))
    done = run_command(["train", "bad-row.yaml", "a.yaml", "diverging.yaml", "b.yaml", "--share-base"], recipe_folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines() == ["runs/a", "runs/b"]
    for name in "ab":
        assert_same(Run(Path("runs") / name), alone(recipe_folder, name))
        assert f"{name}.yaml: 14 steps on cpu" in done.stderr
    error = done.stderr[done.stderr.index("error:") :]
    assert error.startswith("error: 2 of 4 trainings failed")
    assert "bad-row.yaml: " in error and "rows.jsonl" in error
    assert "diverging.yaml: step " in error and "the loss is nan, expected a finite number" in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed(recipe_folder: Path, tmp_path: Path, number: int) -> None:
    """Each finishes its step and saves; gone on with together or alone, each ends as an unbroken run."""
    files = [str(recipe_folder / f"{name}.yaml") for name in "ab"]
    child = RunningCommand(["train", *files, "--share-base"], tmp_path)
    logs = [tmp_path / "runs" / name / "metrics.jsonl" for name in "ab"]
    deadline = time.monotonic() + 300
    while not all(log.exists() and len(log.read_text().splitlines()) > 2 for log in logs):
        assert not child.ended, child.end()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(number)
    done = child.end(150)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert "`lora2serve train --share-base --resume runs/a runs/b` continues them together" in done.stderr
    for name in "ab":
        run = Run(tmp_path / "runs" / name)
        assert run.has_checkpoint and not run.record.finished and not run.adapter.exists()
        assert max(logged(run)) < 14, "the control: it was not at its end"
    again = ["train", "--share-base", "--resume", "runs/a", "runs/b", "--json"]
    done = run_command(again, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["run"] for line in done.stdout.splitlines()] == ["runs/a", "runs/b"]
    for name in "ab":
        assert_same(Run(tmp_path / "runs" / name), alone(recipe_folder, name))
    finished = run_command(again, tmp_path)
    assert finished.returncode == 2 and "runs/a: finished at step 14" in finished.stderr


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, base: Path, data: dict[str, str]) -> None:
    """Nothing more is saved: from its last checkpoint on each ends as an unbroken run."""
    files = write(tmp_path / "alone", base, data, "ab", quantize="none", steps=60, eval_steps=5)
    for file in files:
        fit(file)
        content = {"name": file.parent.name, **yaml.safe_load(file.read_text())}
        (tmp_path / f"{file.parent.name}.yaml").write_text(yaml.safe_dump(content))
    child = RunningCommand(["train", "a.yaml", "b.yaml", "--share-base"], tmp_path)
    runs = [Run(tmp_path / "runs" / name) for name in "ab"]
    deadline = time.monotonic() + 300
    while not all(run.has_checkpoint for run in runs):
        assert not child.ended, child.end()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.end(60).returncode == -signal.SIGKILL
    assert not any(run.adapter.exists() for run in runs), "the control: they were not at their end"
    done = run_command(["train", "--share-base", "--resume", "runs/a", "runs/b"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/a\nruns/b\n"), done.stderr
    for run in runs:
        assert_same(run, alone(tmp_path, run.path.name))


@pytest.mark.slow
def test_a_second_signal_ends_them_at_once(recipe_folder: Path, tmp_path: Path) -> None:
    """In a step, too; what has no checkpoint leaves nothing."""
    files = [str(recipe_folder / f"{name}.yaml") for name in "ab"]
    words = ["train", *files, "--share-base", "--set", "train.steps=100000", "--set", "train.batch_size=64"]
    child = RunningCommand(words, tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "runs" / "b" / "metrics.jsonl").exists():
        assert not child.ended, child.end()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    time.sleep(2.2)  # a pair of signals is one
    if not child.ended:
        child.send_signal(signal.SIGINT)
    done = child.end(60)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_that_waits_is_broken_off() -> None:
    """Turns alone: who is in its steps ends after the one in hand, who is not at once; nobody works beside another."""
    lines: list[str] = []

    def steady(turn: Turn) -> None:
        with turn.steps():
            for number in range(100):
                lines.append(f"step {number}")
                turn.pass_on()
                if turn.stopped:
                    lines.append("saved")
                    return

    def loading(turn: Turn) -> None:
        turn.pass_on()
        lines.append("interrupts")
        turns._interrupt(signal.SIGINT, None)
        turn.pass_on()
        lines.append("not reached")

    turns = Turns(lambda: lines.append("told"))
    with pytest.raises(KeyboardInterrupt):
        turns.run([steady, loading])
    assert lines[-3:] == ["interrupts", "told", "saved"] and "not reached" not in lines
    assert Turns(lambda: None).run([lambda _: None, steady]) == [None, None], "the control"
    assert lines[-1] == "step 99"


@pytest.mark.slow
def test_the_python_api(recipe_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [recipe_folder / f"{name}.yaml" for name in "ab"]
    monkeypatch.chdir(tmp_path)
    outcomes = lora2serve.train_many(files, share_base=True, overrides={"train.steps": 1})
    assert [(each.state, each.run) for each in outcomes] == [("finished", "runs/a"), ("finished", "runs/b")]
