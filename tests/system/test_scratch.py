"""What a process has only while it runs: removed at its end, and by the next one if it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lora2serve.system import scratch
from lora2serve.system.small_files import file_mode, let_umask_decide

PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from lora2serve.system import file_lock, scratch
here = Path(sys.argv[1])
child = [sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"]
subprocess.Popen(child, env={**os.environ, **scratch.environment()})
subprocess.Popen(child)  # the control: not of ours
folder = scratch.temporary_folder("x")
(Path(folder.name) / "file").touch()
with scratch.claimed(here / "claimed", here / ".lock"), file_lock.locked(here / ".lock"):
    (here / "claimed").mkdir()
    (here / "claimed" / "file").touch()
    with scratch.claimed(here / "kept") as keep:
        (here / "kept").touch()
        keep()
    (here / "ready").touch()
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR of this test's own, in this process and in others."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def start(here: Path, seconds: float) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(here), str(seconds)])
    while not (here / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


def sleepers(folder: Path) -> list[int]:
    """Processes that this test's program started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        sleeps = words.split(b"\0")[2:3] == [b"import os, time; os.setsid(); time.sleep(600)"]
        if sleeps and f"TMPDIR={folder}".encode() in environment:
            found.append(int(entry.name))
    return found


def control(folder: Path) -> None:
    """One child was not ours, and lives."""
    (left,) = sleepers(folder)
    os.kill(left, signal.SIGKILL)


def test_its_end(tmp_path: Path, temporary: Path) -> None:
    process = start(tmp_path, 0.2)
    assert process.wait(30) == 0
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "ready", "tmp"]
    control(temporary)


def test_a_kill(tmp_path: Path, temporary: Path) -> None:
    process = start(tmp_path, 600)
    assert scratch.sweep() == (0, 0), "it lives: its lock says so"
    assert len(sleepers(temporary)) == 2 and (tmp_path / "claimed").exists()
    process.kill()
    process.wait()
    assert list(temporary.iterdir()) and (tmp_path / "claimed" / "file").exists(), "the control: it left all of it"
    assert scratch.sweep() == (1, 1)
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "ready", "tmp"], "the lock is gone, too"
    control(temporary)
    assert scratch.sweep() == (0, 0)


def test_what_another_has_taken_over(tmp_path: Path, temporary: Path) -> None:
    """A name that others use as well is theirs once they hold its lock."""
    from lora2serve.system import file_lock

    process = start(tmp_path, 600)
    process.kill()
    process.wait()
    with file_lock.locked(tmp_path / ".lock"):
        assert scratch.sweep() == (1, 0)
        assert (tmp_path / "claimed" / "file").exists()
    control(temporary)


def test_what_is_not_ours(temporary: Path) -> None:
    """Links and files of that name are left alone."""
    outside = temporary.parent / "outside"
    outside.mkdir()
    (temporary / f"{scratch.PREFIX}link").symlink_to(outside)
    (temporary / f"{scratch.PREFIX}file").touch()
    assert scratch.sweep() == (0, 0)
    assert len(list(temporary.iterdir())) == 2 and outside.is_dir()


def test_names_that_are_no_text(temporary: Path) -> None:
    """A folder of any bytes is swept as every other, and ours may lie in one."""
    for parent in (temporary, Path(os.fsdecode(os.fsencode(temporary) + b"/\xff"))):
        parent.mkdir(exist_ok=True)
        tempfile.tempdir = str(parent)
        left = Path(os.fsdecode(os.fsencode(parent) + f"/{scratch.PREFIX}".encode() + b"\xff"))
        left.mkdir()
        child = subprocess.Popen(["sleep", "600"], env={os.fsencode(scratch.VARIABLE): os.fsencode(left)})
        assert scratch.sweep() == (1, 0) and not left.exists()
        assert child.wait(10) != 0


def test_files_are_for_others_to_read(tmp_path: Path) -> None:
    """By the umask, whatever a library made them; links are not followed."""
    for name in ("adapter_model.safetensors", "outside"):
        (tmp_path / name).touch(mode=0o600)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "link").symlink_to(tmp_path / "outside")
    before = os.umask(0o027)
    try:
        let_umask_decide(folder)
        assert file_mode() == 0o640
    finally:
        os.umask(before)
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o600


def test_a_folder_is_tried_and_not_made(tmp_path: Path, temporary: Path) -> None:
    """Another process may begin to rely on it meanwhile. What is refused is what making it would be refused with."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("new/below", "empty", "."):
        scratch.try_folder(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*") if temporary not in (path, *path.parents)) == [
        "empty",
        "file",
    ]
    for name in ("file", "file/below", "x" * 300):
        refused = []
        for way in (scratch.try_folder, lambda folder: scratch.filled(folder).__enter__()):
            with pytest.raises(OSError) as caught:
                way(tmp_path / name)
            refused.append(caught.value.strerror)
        assert refused[0] == refused[1], name
