"""Several processes train one run: as one process would, into one directory, and they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lora2serve.artifacts.run import Run
from lora2serve.errors import TrainError
from lora2serve.system.launcher import Launch
from lora2serve.training import process_group
from lora2serve.training.checkpoints import last_checkpoint
from tests.support.commands import run_command
from tests.support.ranks import ends, launched, start_python, start_together, train_together
from tests.support.runs import DEMO, fit, logged, recipe_file, uneven_data

pytestmark = [pytest.mark.engine, pytest.mark.skipif(torch.cuda.is_available(), reason="one CPU beside two")]

STEPS = 32


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Nine rows, of which the last step of an epoch has one; held-out ones of very different lengths."""
    return uneven_data(tmp_path_factory.mktemp("nine"), 9, 7)


def adapter(run: Run) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(run.adapter / "adapter_model.safetensors")
    return tensors


def assert_as_one(run: Run, whole: Run) -> None:
    """The same adapter, losses and counts."""
    for key, bound in (("loss", 1e-5), ("grad_norm", 1e-5), ("eval_loss", 1e-5), ("entropy", 1e-4)):
        assert logged(run, key) == pytest.approx(logged(whole, key), abs=bound), key
    assert logged(run, "num_tokens") == logged(whole, "num_tokens")
    mine, other = adapter(run), adapter(whole)
    assert max(float((mine[name] - other[name]).abs().max()) for name in other) < 1e-6
    start = max(float(tensor.abs().max()) for name, tensor in other.items() if "lora_B" in name)
    assert start > 1e-3, "the control: it was trained"
    found = [each.record.metrics.tuned for each in (run, whole)]
    assert found[0] is not None and found[1] is not None
    assert found[0].tokens == found[1].tokens
    assert found[0].eval_loss == pytest.approx(found[1].eval_loss, abs=1e-5)
    last = max(logged(run, "eval_loss"))
    assert logged(run, "eval_loss")[last] == pytest.approx(found[0].eval_loss, abs=1e-5)
    assert logged(run, "eval_tokens")[last] == found[0].tokens


PLAIN: dict[str, Any] = {"quantize": "none", "batch_size": 2, "accumulation": 2, "steps": None, "epochs": 2.0}


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_train_what_one_trains(tmp_path: Path, small: Path, nine: dict[str, str], packing: bool) -> None:
    """Four rows a step, one in the last step of an epoch: one of the two has none then."""
    data = {**nine, "packing": packing}
    recipe_file(tmp_path, small, data, **PLAIN, eval_steps=3)
    whole, _, _ = fit(tmp_path / "lora2serve.yaml", into=tmp_path / "whole")
    first, second = train_together(tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout == "runs/run\n"
    assert (second.stdout, second.stderr) == ("", "")
    assert "6 steps on cpu by 2 processes" in first.stderr or packing
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["latest", "run"]
    run = Run(tmp_path / "runs" / "run")
    assert [path.name for path in run.path.glob(".*")] == []
    assert list(logged(run)) == list(range(1, len(logged(whole)) + 1)), "a line for each step"
    loop = run.record.loop
    assert loop is not None and (loop.rows, loop.accumulation, loop.processes) == (1, 2, 2)
    assert_as_one(run, whole)


def test_python_gets_a_whole_run(tmp_path: Path, small: Path, nine: dict[str, str]) -> None:
    """In each process, also in one that has nothing to write in the end."""
    recipe_file(tmp_path, small, nine, quantize="none", steps=1)
    code = "import lora2serve; run = lora2serve.train(); print(run.path, run.record.finished)"
    children = start_python(tmp_path, ["-c", code])
    assert [(code, out) for code, out, _ in ends(children)] == [(0, "runs/run True\n")] * 2


def test_an_error_of_all_is_shown_once(tmp_path: Path, small: Path, nine: dict[str, str]) -> None:
    """Before anything is loaded, and where only all of them together can know it."""
    recipe_file(tmp_path, small, nine, steps=2, learning_rate=-1.0)
    done = train_together(tmp_path)
    assert [each.returncode for each in done] == [2, 2]
    assert "".join(each.stderr for each in done).count("train.learning_rate") == 1
    recipe_file(tmp_path, small, nine, steps=2, batch_size=3, accumulation=3)
    done = train_together(tmp_path)
    assert [each.returncode for each in done] == [1, 1]
    errors = "".join(each.stderr for each in done)
    assert errors.count("error:") == 1
    assert "train.batch_size times accumulation: 9 rows a step, which 2 processes cannot share evenly" in errors
    assert "set them to 8 or 10 rows in all" in errors
    assert not (tmp_path / "runs").exists()


def test_one_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for forever."""
    monkeypatch.setattr(process_group, "MEET", timedelta(seconds=3))
    for name, setting in launched(3)[0].items():
        monkeypatch.setenv(name, setting)
    with (
        pytest.raises(TrainError, match=r"do not meet there .*1/3 clients joined"),
        process_group.together(Launch(0, 3, 0, 3)),
    ):
        pass


def test_ctrl_c_while_the_others_do_not_come(tmp_path: Path, nine: dict[str, str]) -> None:
    """It ends at once, and not when all are there or ten minutes have gone."""
    recipe_file(tmp_path, tmp_path / "base", nine, batch_size=4)
    child = Popen(
        [sys.executable, "-m", "lora2serve", "train"], cwd=tmp_path, env={**os.environ, **launched(3)[0]},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stderr and "3 processes train together" in child.stderr.readline()
        wait_for(lambda: "LISTEN" in {link.status for link in psutil.Process(child.pid).net_connections()}, [child])
        time.sleep(1)  # for it to wait there
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
    finally:
        child.kill()
    assert not (tmp_path / "runs").exists()


def wait_for(there: Callable[[], bool], children: Sequence[Popen[str]]) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert all(child.poll() is None for child in children), ends(children)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(folder: Path) -> int:
    path = folder / "runs" / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_signal_to_one_stops_all(tmp_path: Path, nine: dict[str, str]) -> None:
    """To the one that writes nothing: both finish the same step, and the first saves it."""
    recipe_file(tmp_path, DEMO / "base", nine, quantize="none", steps=400, log_interval=1)
    children = start_together(tmp_path)
    wait_for(lambda: lines(tmp_path) >= 3, children)
    children[1].send_signal(signal.SIGTERM)
    sent = lines(tmp_path)
    (code, out, err), (other_code, other_out, other_err) = ends(children)
    assert (code, other_code) == (130, 130), err + other_err
    assert out + other_out == ""
    assert "Traceback" not in err + other_err
    assert (err + other_err).count("interrupted") == 1
    run = Run(tmp_path / "runs" / "run")
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    step = int(checkpoint.name.rpartition("-")[2])
    assert step <= sent + 2, "the step in hand, or the one after it"
    assert f"saved at step {step} of 400" in err
    assert list(logged(run)) == list(range(1, step + 1))
    assert sorted(path.name for path in checkpoint.glob("rng_state*")) == ["rng_state.pth", "rng_state_1.pth"]


LONG: dict[str, Any] = {"quantize": "none", "steps": STEPS, "eval_steps": 8, "batch_size": 2, "lora": {"dropout": 0.1}}


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """By torch's own launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "lora2serve", "train", *words], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, nine: dict[str, str]) -> Run:
    """By torchrun, with dropout, whose numbers each process draws for itself."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe_file(folder, DEMO / "base", nine, **LONG)
    done = torchrun(folder)
    assert (done.returncode, done.stdout) == (0, "runs/run\n"), done.stderr
    return Run(folder / "runs" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGTERM)])
def test_killed_and_resumed(tmp_path: Path, nine: dict[str, str], unbroken: Run, killed: int, number: int) -> None:
    """Whichever it is: the other one ends, too, and says so once; resumed, the run ends bit for bit as an unbroken one."""
    recipe_file(tmp_path, DEMO / "base", nine, **LONG)
    children = start_together(tmp_path)
    wait_for(lambda: lines(tmp_path) >= 7, children)  # a checkpoint at step 4
    children[killed].send_signal(number)
    found = ends(children)
    survivor = found[1 - killed]
    if number == signal.SIGKILL:
        assert (found[killed][0], survivor[0]) == (-signal.SIGKILL, 1)
        assert survivor[2].count("another process of this training has ended without a word") == 1
    assert "Traceback" not in survivor[2]
    run = Run(tmp_path / "runs" / "run")
    assert not run.adapter.exists(), "the control: it was not finished"
    done, other_done = train_together(tmp_path, "--resume")
    assert (done.returncode, done.stdout) == (0, "runs/run\n"), done.stderr + other_done.stderr
    assert logged(run) == logged(unbroken)
    assert logged(run, "eval_loss") == logged(unbroken, "eval_loss")
    mine, other = adapter(run), adapter(unbroken)
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.slow
def test_one_goes_on_with_what_two_began(tmp_path: Path, nine: dict[str, str]) -> None:
    """The same rows a step, which round differently: a warning."""
    recipe_file(tmp_path / "whole", DEMO / "base", nine, **{**PLAIN, "epochs": 8.0})
    whole, _, _ = fit(tmp_path / "whole" / "lora2serve.yaml")
    recipe_file(tmp_path, DEMO / "base", nine, **{**PLAIN, "epochs": 8.0})
    children = start_together(tmp_path)
    wait_for(lambda: lines(tmp_path) >= 2, children)
    children[0].send_signal(signal.SIGTERM)
    ends(children)
    run = Run(tmp_path / "runs" / "run")
    resumed, told, _ = fit(run.recipe, into=run.path, resume=True)
    assert any("begun by 2 processes, and 1 go on with it" in text for text in told.warnings)
    assert logged(resumed) == pytest.approx(logged(whole), abs=1e-3)
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")


def test_gpus_of_this_machine(
    tmp_path: Path, small: Path, nine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that knows two GPUs, which torch cannot use: a process for each, on the CPU."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nprintf 'A, 1 MiB, 1\\nA, 1 MiB, 1\\n'\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    recipe_file(tmp_path, small, nine, steps=2, quantize="none")
    done = run_command(["train", "--gpus", "all", "--set", "train.steps=3"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/run\n"), done.stderr
    assert done.stderr.count("3 steps on cpu by 2 processes") == 1
    assert done.stderr.count("next: `lora2serve export") == 1
    assert list(logged(Run(tmp_path / "runs" / "run"))) == [1, 2, 3]
    for words, problem in (("3", "expected all, or a number from 1 to 2"), ("two", "expected all, or a number")):
        refused = run_command(["train", "--gpus", words], tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert problem in refused.stderr
    failed = run_command(["train", "no-such.yaml", "--gpus", "2"], tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("error:") == 1 and "no-such.yaml" in failed.stderr


def test_gpus_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = run_command(["train", "demo", "--gpus", "two"], tmp_path)
    assert refused.returncode == 2 and "--gpus two: expected all, or a number" in refused.stderr
    refused = run_command(["train", "demo", "--gpus", "2"], tmp_path)
    assert refused.returncode == 2
    assert "--gpus 2: no NVIDIA GPU is here" in refused.stderr and "torchrun --nproc-per-node" in refused.stderr
