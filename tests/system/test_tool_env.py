"""llm-compressor's own environment: whole or not there, whatever happens while it is made."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora2serve.cli import run
from lora2serve.errors import EngineError
from lora2serve.progress import Silent
from lora2serve.system import tool_env

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds no package anywhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache" / "lora2serve"


def half_made() -> Path:
    """What a killed make leaves behind."""
    folder = tool_env.folder()
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def test_without_a_marker_it_is_not_there(cache: Path) -> None:
    folder = half_made()
    assert tool_env.python() is None
    with pytest.raises(EngineError, match="environment of llm-compressor is missing") as refused:
        tool_env.require()
    assert refused.value.hint == "`lora2serve doctor --fix` makes it"
    (folder / tool_env.MARKER).write_text("{}")
    assert tool_env.require() == folder / "bin" / "python", "the control"
    assert tool_env.make(Silent()) == folder, "made already: nothing is asked of pip"
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to("/no/python")
    assert tool_env.python() is None, "its Python is gone from the machine"


def test_ctrl_c_while_it_is_made(cache: Path) -> None:
    """A real make, interrupted while it makes the virtual environment."""
    script = "from lora2serve.system.tool_env import make; from lora2serve.progress import Silent; make(Silent())"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(600):
        if (tool_env.folder() / "bin").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_told_beforehand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_env, "SPACE", 1 << 62)
    with pytest.raises(EngineError, match=r"GB free, the environment of llm-compressor needs"):
        tool_env.make(Silent())
    assert list(cache.iterdir()) == []


@pytest.mark.engine
def test_what_pip_cannot_get_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real make over a half-made one, by ``doctor --fix``, which brings the rest all the same."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(cache))
    (cache / "conversion").mkdir(parents=True)
    half_made()
    assert run(["doctor"]) == 0
    assert re.search(r"llm-compressor +no environment\n +-> lora2serve doctor --fix", capfd.readouterr().out)
    assert run(["doctor", "--fix"]) == 1
    out, err = capfd.readouterr()
    assert "No matching distribution found for torch" in err and "hint: is there a network?" in err
    assert re.search("llm-compressor +no environment", out) and re.search(f"llama.cpp converter +{cache}", out)
    assert [path.name for path in cache.iterdir()] == ["conversion"]


def test_pins_are_those_of_the_setup() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch,) = [line for line in pins if line.startswith("torch==")]
    assert f"{torch}+cpu" == tool_env.TORCH_CPU
    assert f'"{tool_env.TORCH}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert tool_env.CPU_INDEX in (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
