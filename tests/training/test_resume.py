"""A run that is killed, interrupted or out of disk goes on with --resume and ends where an unbroken one ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora2serve.artifacts.run import Run
from lora2serve.cli import run as command
from lora2serve.training.checkpoints import last_checkpoint
from tests.support.commands import RunningCommand
from tests.support.runs import DEMO, fit, logged, recipe_file

pytestmark = pytest.mark.engine

STEPS = 24


def write_recipe(folder: Path, chats: dict[str, str]) -> Path:
    return recipe_file(folder, DEMO / "base", chats, steps=STEPS, eval_steps=8, lora={"dropout": 0.1})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, chats: dict[str, str]) -> Run:
    run, _, _ = fit(write_recipe(tmp_path_factory.mktemp("unbroken"), chats))
    return run


def start(folder: Path) -> RunningCommand:
    """``lora2serve train`` as a child process, in a session of its own."""
    return RunningCommand(["train"], folder)


def stop_at(child: RunningCommand, there: Callable[[], bool], number: int) -> subprocess.CompletedProcess[str]:
    """Send a signal once ``there`` says so; how it ended."""
    deadline = time.monotonic() + 300
    while not there():
        assert not child.ended, child.end()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(number)
    return child.end(150)


def lines(folder: Path) -> int:
    path = folder / "runs" / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def assert_same_end(run: Run, unbroken: Run) -> None:
    assert list(logged(run)) == list(range(1, STEPS + 1)), "each step is in the log once"
    for step, loss in logged(unbroken).items():
        assert logged(run)[step] == pytest.approx(loss, abs=1e-5), step
    assert logged(run, "num_tokens") == logged(unbroken, "num_tokens"), "counted on from the checkpoint"
    mine, other = (load_file(each.adapter / "adapter_model.safetensors") for each in (run, unbroken))
    assert all(torch.allclose(mine[name], other[name], atol=1e-6) for name in other)
    found = [each.record.metrics.tuned.eval_loss for each in (run, unbroken)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_kill_9_then_resume_ends_like_an_unbroken_run(tmp_path: Path, chats: dict[str, str], unbroken: Run) -> None:
    write_recipe(tmp_path, chats)
    child = start(tmp_path)
    assert stop_at(child, lambda: lines(tmp_path) >= 11, signal.SIGKILL).returncode == -signal.SIGKILL
    run = Run(tmp_path / "runs" / "run")
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    done = int(checkpoint.name.rpartition("-")[2])
    assert 9 <= done < STEPS
    assert not run.adapter.exists(), "the control: it was not finished"
    base_before = run.record.metrics.base

    resumed, told, _ = fit(run.recipe, into=run.path, resume=True)
    assert_same_end(resumed, unbroken)
    assert resumed.record.metrics.base == base_before
    assert told.bars["train"] == [STEPS, STEPS], "the bar starts where the run was"
    assert "eval before" not in told.bars, "the base is not measured again"


def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path,
    chats: dict[str, str],
    unbroken: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_recipe(tmp_path, chats)
    child = start(tmp_path)
    done = stop_at(child, lambda: lines(tmp_path) >= 6, signal.SIGINT)
    err = done.stderr
    assert done.returncode == 130, err
    assert done.stdout == ""
    assert "Traceback" not in err
    run = Run(tmp_path / "runs" / "run")
    (told,) = [line for line in err.splitlines() if "saved at step" in line]
    step = int(told.split("saved at step ")[1].split()[0])
    assert told == f"saved at step {step} of {STEPS}"
    assert "runs/run is kept: `lora2serve train --resume` continues from its last checkpoint" in err
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"

    monkeypatch.chdir(tmp_path)
    assert command(["train", "--resume"]) == 0
    assert capfd.readouterr().out == "runs/run\n"
    assert_same_end(run, unbroken)
    assert command(["train", "--resume"]) == 2
    assert f"runs/run: finished at step {STEPS}" in capfd.readouterr().err


def test_a_scheduler_s_sigterm_saves_too(tmp_path: Path, chats: dict[str, str]) -> None:
    write_recipe(tmp_path, chats)
    child = start(tmp_path)
    done = stop_at(child, lambda: lines(tmp_path) >= 4, signal.SIGTERM)
    assert done.returncode == 130, done.stderr
    assert "saved at step" in done.stderr
    assert last_checkpoint(Run(tmp_path / "runs" / "run"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_first_step_leaves_nothing(tmp_path: Path, chats: dict[str, str], number: int) -> None:
    """Of an init that saves its start as well; the last run is still the last one."""
    (tmp_path / "runs" / "before").mkdir(parents=True)
    latest = tmp_path / "runs" / "latest"
    if number == signal.SIGTERM:
        latest.symlink_to("before")
    recipe_file(tmp_path, DEMO / "base", chats, steps=STEPS, quantize="none", lora={"init": "pissa"})
    run = tmp_path / "runs" / "run"
    child = start(tmp_path)
    done = stop_at(child, (run / "checkpoints" / "initial").is_dir, number)
    err = done.stderr
    assert done.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    if lines(tmp_path):  # it came in the first step, which was then finished and saved
        assert last_checkpoint(Run(run))
        return
    assert "--resume" not in err, "there is nothing to go on from"
    assert not run.exists()
    assert latest.is_symlink() == (number == signal.SIGTERM)
    assert number == signal.SIGINT or latest.readlink() == Path("before")


def test_ctrl_c_after_the_last_step_says_how_to_go_on(
    tmp_path: Path, chats: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While the tuned model is measured: the run is kept, --resume measures it and is done."""
    from lora2serve.training import eval_loss

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    recipe_file(tmp_path, DEMO / "base", chats, steps=2)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(eval_loss, "on_original", interrupted)
        assert command(["train"]) == 130
    assert "runs/run is kept: `lora2serve train --resume` continues" in capfd.readouterr().err
    assert not Run(tmp_path / "runs" / "run").record.finished
    for words in (["inspect", "runs/run"], ["export", "runs/run", "--target", "vllm", "--dry-run"]):
        assert command(words) == 0
        shown = capfd.readouterr()
        assert "interrupted: `lora2serve train --resume runs/run` continues it" in shown.out + shown.err
    assert command(["export", "--target", "vllm", "--dry-run"]) == 2
    assert "`lora2serve train --resume runs/run` finishes that run" in capfd.readouterr().err
    assert command(["train", "--resume"]) == 0
    assert command(["inspect", "runs/run"]) == 0
    assert "interrupted" not in capfd.readouterr().out, "the control"
    assert Run(tmp_path / "runs" / "run").record.finished
    assert list(logged(Run(tmp_path / "runs" / "run"))) == [1, 2]


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path, unbroken: Run) -> None:
    """The trainer writes trainer_state.json last: a kill before or inside it leaves no checkpoint to go on from."""
    run = Run(tmp_path / "run")
    shutil.copytree(unbroken.path, run.path)
    newest = last_checkpoint(run)
    assert newest is not None
    assert newest.name == f"checkpoint-{STEPS}"
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    older = last_checkpoint(run)
    assert older is not None
    assert older.name == f"checkpoint-{STEPS - 3}"
    (older / "trainer_state.json").unlink()
    assert last_checkpoint(run) is None


def test_killed_after_the_last_step(tmp_path: Path, unbroken: Run) -> None:
    """Between the last checkpoint and the end: resume trains no step more and finishes the rest."""
    run = Run(tmp_path / "run")
    shutil.copytree(unbroken.path, run.path)
    shutil.rmtree(run.adapter)
    (run.path / "loss.png").unlink()
    run.save(replace(run.record, finished=False))
    resumed, _, _ = fit(run.recipe, into=run.path, resume=True)
    assert_same_end(resumed, unbroken)
    assert resumed.record.finished
    assert (run.path / "loss.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--resume",), "no runs/latest here"),
        (("--resume", "no-such-run"), "--resume no-such-run: not a run"),
        (("--resume", "--set", "train.steps=9"), "no --set and no --name"),
    ],
)
def test_nothing_to_resume(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["train", *words]) == 2
    assert said in capfd.readouterr().err
