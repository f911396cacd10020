"""Several recipes at once: one that fails leaves the others, and Ctrl-C ends them all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lora2serve.artifacts.run import Run
from tests.support.commands import asking, run_command
from tests.support.runs import make_chat_model, recipe_file, rows, write_jsonl


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of them: the third one's model has no weights."""
    folder = tmp_path_factory.mktemp("recipes")
    model = make_chat_model(folder / "base")
    empty = make_chat_model(folder / "empty")
    (empty / "model.safetensors").write_bytes(b"")
    data = {"train": str(write_jsonl(folder / "train.jsonl", rows("train.jsonl", 8)))}
    for name in "abcd":
        base = empty if name == "c" else model
        file = recipe_file(folder / name, base, data, steps=2, quantize="none")
        content = {"name": name, **yaml.safe_load(file.read_text())}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


FILES = [f"{name}.yaml" for name in "abcd"]


@pytest.mark.engine
def test_one_that_fails_leaves_the_others(recipes: Path) -> None:
    done = run_command(["train", *FILES, "--jobs", "2", "--set", "train.steps=1"], recipes)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == ["runs/a", "runs/b", "runs/d"]
    for name in "abd":
        run = Run(recipes / "runs" / name)
        assert run.record.finished and run.record.steps == 1
        assert f"{name}.yaml: 1 steps on cpu" in done.stderr
    assert not (recipes / "runs" / "c").exists()
    error = done.stderr[done.stderr.index("error:") :]
    assert error.startswith("error: 1 of 4 trainings failed")
    assert "c.yaml: " in error and "empty" in error and "a.yaml" not in error
    assert "Traceback" not in done.stderr
    again = run_command(["--quiet", "train", "a.yaml", "b.yaml", "--json"], recipes)
    assert again.returncode == 0, again.stderr
    found = sorted((json.loads(line) for line in again.stdout.splitlines()), key=lambda each: str(each["recipe"]))
    assert [(each["recipe"], each["state"], each["run"]) for each in found] == [
        ("a.yaml", "finished", "runs/a-2"), ("b.yaml", "finished", "runs/b-2"),
    ]  # fmt: skip


def test_what_cannot_be_is_refused_before_the_first_begins(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ask = asking(recipes, monkeypatch, capfd)
    (recipes / "wrong.yaml").write_text(yaml.safe_dump({"model": {"path": "base"}, "data": {"train": "x", "evl": 1}}))
    refused = ask(["train", "a.yaml", "no-such.yaml", "wrong.yaml"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no-such.yaml" in refused.stderr and "data.evl" in refused.stderr and "wrong.yaml" in refused.stderr
    refused = ask(["train", "a.yaml", "b.yaml", "--name", "x", "--resume", "--gpus", "2"])
    assert refused.returncode == 2
    assert all(f"{option}: of one training, and 2 recipes" in refused.stderr for option in ("--name", "--gpus"))
    assert "--resume: of one training, or with --share-base or --on ray, and 2 are named" in refused.stderr
    refused = ask(["train", "a.yaml", "--jobs", "2"])
    assert refused.returncode == 2 and "--jobs 2: of several recipes, and 1 is named" in refused.stderr


@pytest.mark.engine
@pytest.mark.slow
def test_ctrl_c_ends_them_all(recipes: Path, tmp_path: Path) -> None:
    """Each finishes its step and saves."""
    command = [sys.executable, "-m", "lora2serve", "train", "../a.yaml", "../b.yaml", "--jobs", "2"]
    folder = recipes / "stopped"
    folder.mkdir()
    child = subprocess.Popen(
        [*command, "--set", "train.steps=100000"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    logs = [folder / "runs" / name / "metrics.jsonl" for name in "ab"]
    while not all(log.exists() and len(log.read_text().splitlines()) > 1 for log in logs):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=150)
    assert (child.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    for name in "ab":
        assert Run(folder / "runs" / name).has_checkpoint
        assert f"../{name}.yaml: runs/{name} is kept" in err
