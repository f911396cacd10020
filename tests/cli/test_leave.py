"""The quick end of the process loses nothing: output, files, exit code, temporary folders, children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import make_adapter, make_model

# With torch loaded, as after every command that is worth ending quickly; "{end}" ends the process.
PROGRAM = """
import atexit, multiprocessing, os, sys, tempfile, threading, time, types
sys.modules["torch"] = types.ModuleType("torch")
from lora2serve.cli.leave import leave

class Slow:
    def __del__(self):
        os.write(2, b"teardown")

def later():
    time.sleep(0.3)
    open("thread", "w").write("whole")

def rest():
    os.closerange(0, 3)  # whoever reads the parent's output waits for no child
    time.sleep(60)

slow = Slow()
folder = tempfile.TemporaryDirectory(dir=".")
child = multiprocessing.get_context("fork").Process(target=rest, daemon=True)
child.start()
open("child", "w").write(str(child.pid))
threading.Thread(target=later).start()
atexit.register(lambda: open("handler", "w").write("whole"))
print("x" * 300_000)
print("end", end="")
{end}
"""
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def end(here: Path, how: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.replace("{end}", how)
    return subprocess.run(
        [sys.executable, "-c", program], cwd=here, env=BUFFERED, capture_output=True, text=True, check=False
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_lost(tmp_path: Path) -> None:
    done = end(tmp_path, "leave(3)")
    assert done.returncode == 3
    assert done.stdout == "x" * 300_000 + "\nend"
    assert done.stderr == "", "modules are not taken apart"
    assert (tmp_path / "thread").read_text() == (tmp_path / "handler").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "handler", "thread"]
    assert not alive(int((tmp_path / "child").read_text()))


def test_the_controls(tmp_path: Path) -> None:
    """The usual end takes modules apart; an end without care loses all that is looked at above."""
    assert "teardown" in end(tmp_path, "sys.exit(3)").stderr
    careless = tmp_path / "careless"
    careless.mkdir()
    done = end(careless, "os._exit(3)")
    pid = int((careless / "child").read_text())
    assert alive(pid)
    os.kill(pid, 9)
    assert "end" not in done.stdout
    assert len(list(careless.iterdir())) == 2, "the folder is there; handler and thread wrote nothing"


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    program = PROGRAM.replace("{end}", "leave(0)").replace("300_000", "3")  # what is left in the buffer
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=BUFFERED,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "handler").read_text() == "whole"


@pytest.mark.engine
@pytest.mark.parametrize("code", [0, 1])
def test_a_command(tmp_path: Path, code: int) -> None:
    """The real thing, with the real torch: an export and a failed one, through a pipe."""
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    if code:
        (tmp_path / "out" / "vllm").mkdir(parents=True)
        (tmp_path / "out" / "vllm" / "lora2serve.json").touch()
    words = [sys.executable, "-m", "lora2serve", "export", str(adapter), "-t", "vllm", "-o", "out", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    paths = [export["path"] for export in json.loads(done.stdout)] if not code else []
    assert (paths == [str(tmp_path / "out" / "vllm")]) if not code else done.stdout == ""
    assert ("already exists" in done.stderr) == bool(code)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vllm"]


HOOK = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000): pass

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.argv[1:] = ["--help"]
"""
ENTRY = "from lora2serve.__main__ import start; start()"
WITHOUT = "from lora2serve.cli import main; main()"


@pytest.mark.parametrize("module", ["lora2serve.cli.export", "lora2serve.console"])
@pytest.mark.parametrize(("call", "traceback"), [(ENTRY, False), (WITHOUT, True)], ids=["the command", "the control"])
def test_ctrl_c_while_modules_load(call: str, traceback: bool, module: str) -> None:
    words = [sys.executable, "-c", HOOK.format(module=module) + call]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == ""
    assert ("Traceback" in done.stderr) == traceback
    assert traceback or done.stderr == ""


AT_ONCE = """
import os, signal
from lora2serve.system import interruption
from lora2serve.cli import main

def end_like_ctrl_c(before=interruption.end_like_ctrl_c):
    before()
    os.kill(os.getpid(), {ending})

interruption.end_like_ctrl_c = end_like_ctrl_c
main(["--help"])
"""


def test_a_signal_as_soon_as_it_is_ctrl_c() -> None:
    for ending, code in (("signal.SIGTERM", 130), ("0", 0)):
        words = [sys.executable, "-c", AT_ONCE.format(ending=ending)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "interrupted\n" if code else ""), done.stderr
        assert bool(done.stdout) == (not code), "the control"
