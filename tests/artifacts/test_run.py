"""Where `runs/latest` points, and which run `train --resume` goes on with."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lora2serve.artifacts import run as runs
from lora2serve.artifacts.run_record import RunRecord
from lora2serve.system import scratch


def finish(run: runs.Run) -> None:
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").touch()
    run.save(run.record)


def test_latest_moves_once_a_run_is_finished(tmp_path: Path) -> None:
    """A run that is under way, or was cut off, leaves the link to the one before."""
    root = tmp_path / "runs"
    first = runs.create("first", root)
    with runs.kept_once_started(first):
        assert not (root / "latest").exists()
        finish(first)
    second = runs.create("second", root)
    with pytest.raises(KeyboardInterrupt), runs.kept_once_started(second):
        checkpoint(second, 1)
        assert runs.latest(root).path == first.path
        raise KeyboardInterrupt
    assert runs.latest(root).path == first.path and second.path.is_dir()
    with runs.kept_once_started(second):
        finish(second)
    assert runs.latest(root).path == second.path, "the control"


def test_an_unfinished_one_of_the_same_name_is_found(tmp_path: Path) -> None:
    first, second, third, fourth = (runs.create("demo", tmp_path) for _ in range(4))
    for run in (first, second):
        run.save(run.record)
        checkpoint(run, 1)
    assert runs.unfinished_before(fourth, "demo") == second, "the last before it"
    (second.path / "run.json").write_text("{")
    assert runs.unfinished_before(third, "demo") == first, "a broken one is no reason not to train"
    assert runs.unfinished_before(first, "demo") is None
    assert runs.unfinished_before(runs.create("demo-3x", tmp_path), "demo-3x") is None


def test_one_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with scratch.filled(root), pytest.raises(KeyboardInterrupt), runs.kept_once_started(runs.create("only", root)):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from lora2serve.artifacts import run as runs
from lora2serve.system import scratch
root = Path(sys.argv[1])
with scratch.filled(root):
    run = runs.create("demo", root)
    with runs.kept_once_started(run):
        (run.path / "recipe.yaml").touch()
        for name in sys.argv[2:]:
            (run.path / name).parent.mkdir(parents=True)
            (run.path / name).touch()
        print("ready", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("made", "stays"),
    [
        (["eval.jsonl/x"], False), (["checkpoints/checkpoint-1/model.safetensors"], False),
        (["checkpoints/checkpoint-1/trainer_state.json"], True), (["adapter/adapter_config.json"], True),
    ],
)  # fmt: skip
def test_one_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str], stays: bool) -> None:
    """The next command removes it, unless there is something to go on from, or the whole of it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    root = tmp_path / "runs"
    words = [sys.executable, "-c", KILLED, str(root), *made]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        scratch.sweep()
        assert (root / "demo" / "recipe.yaml").exists(), "it lives"
        process.kill()
    assert (root / "demo" / "recipe.yaml").exists(), "the control"
    scratch.sweep()
    assert (root / "demo" / "recipe.yaml").exists() == root.exists() == stays
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_newest_is_the_one_at_work_last(tmp_path: Path) -> None:
    assert runs.newest(tmp_path) is None
    for number, name in enumerate(("old", "new")):
        folder = runs.create(name, tmp_path).path
        (folder / "recipe.yaml").touch()
        os.utime(folder / "recipe.yaml", (number, number))
    newest = runs.newest(tmp_path)
    assert newest and newest.name == "new"
    (tmp_path / "old" / "metrics.jsonl").touch()
    newest = runs.newest(tmp_path)
    assert newest and newest.name == "old", "the control: it was resumed since"


def checkpoint(run: runs.Run, step: int) -> None:
    folder = run.path / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError])
def test_what_is_left(tmp_path: Path, problem: type[BaseException]) -> None:
    before = runs.create("before", tmp_path)
    runs.point_latest(before)
    for name, steps in (("short", 0), ("long", 3)):
        run = runs.create(name, tmp_path)
        with pytest.raises(problem), runs.kept_once_started(run):
            (run.path / "checkpoints" / "initial").mkdir(parents=True)  # of an init that changes the base
            run.save(RunRecord(name=name))
            if steps:
                checkpoint(run, steps)
            raise problem
        assert run.path.exists() == run.has_checkpoint == bool(steps)
        assert (tmp_path / "latest").readlink() == Path("before")
    assert run.resumable == f"interrupted: `lora2serve train --resume {run.path}` continues it"
    run.save(RunRecord(name=name, finished=True))
    assert run.resumable == "", "the control"
