"""An environment of its own for llm-compressor, whose pins (transformers, compressed-tensors) do not fit vLLM's.

It is in the user's cache. A marker, written last, says that it is complete: what an interrupted `make` leaves has none,
is never used, and is removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lora2serve.errors import EngineError
from lora2serve.progress import Progress
from lora2serve.system import file_lock, scratch
from lora2serve.system.hardware import cache_folder, nvidia_gpus
from lora2serve.system.worker_process import PYTHON

COMPRESSOR = "llmcompressor==0.14.0.1"
TORCH, TORCH_CPU = "torch==2.13.*", "torch==2.13.0+cpu"  # as scripts/setup.sh has them
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MARKER = ".whole.json"
SPACE = 3 << 30  # bytes; 1.5 GB on the CPU, and as much again while pip unpacks
FIX = "lora2serve doctor --fix"


def folder() -> Path:
    """The environment's folder, there or not: a cache shared by machines keeps those with and without GPU apart."""
    kind = "cuda" if nvidia_gpus() else "cpu"
    version = COMPRESSOR.partition("==")[2]
    return cache_folder() / f"llm-compressor-{version}-py{sys.version_info[0]}.{sys.version_info[1]}-{kind}"


def python() -> Path | None:
    """The environment's interpreter; None where it is not installed, or not completely."""
    interpreter = folder() / "bin" / "python"
    return interpreter if (folder() / MARKER).is_file() and os.access(interpreter, os.X_OK) else None


def require() -> Path:
    """The environment's interpreter; EngineError with a hint where there is none."""
    interpreter = python()
    if interpreter is None:
        raise EngineError(f"the environment of llm-compressor is missing ({folder()})", f"`{FIX}` makes it")
    return interpreter


def make(progress: Progress) -> Path:
    """Make the environment unless it is there; its folder. EngineError where pip fails or the disk is full."""
    target = folder()
    if python() is not None:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < SPACE:
        raise EngineError(
            f"{target.parent}: {free / 1e9:.1f} GB free, the environment of llm-compressor needs {SPACE / 1e9:.0f}",
            "make room on that disk, or name another cache with XDG_CACHE_HOME",
        )
    lock = target.with_name(f"{target.name}.lock")
    with file_lock.locked(lock, wait=True):
        if python() is None:  # of two at once the second has nothing to do
            with scratch.claimed(target, lock) as keep:
                _fill(target, progress)
                keep()
    return target


def _fill(target: Path, progress: Progress) -> None:
    shutil.rmtree(target, ignore_errors=True)  # what one that lost its machine left
    progress.note(f"making the environment of llm-compressor in {target}")
    _run([*PYTHON, "-m", "venv", str(target)], progress, "on Debian and Ubuntu: apt install python3-venv")
    pip = [str(target / "bin" / "python"), "-P", "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["--progress-bar", "off"]
    _install_torch(pip, progress)
    _run([*pip, COMPRESSOR], progress)
    show = [str(target / "bin" / "python"), "-I", "-c", "import llmcompressor; print(llmcompressor.__version__)"]
    version = _run(show, progress, "remove it from the cache and run it again")[-1]
    (target / MARKER).write_text(json.dumps({"llmcompressor": version}) + "\n", encoding="utf-8")


def _install_torch(pip: Sequence[str], progress: Progress) -> None:
    """Before llm-compressor, or pip takes a CUDA build on any machine. PyTorch's own index comes last: it is slow."""
    if nvidia_gpus():
        _run([*pip, TORCH], progress)
        return
    try:
        _run([*pip, TORCH_CPU], progress)
    except EngineError as error:
        if "No matching distribution" not in error.message:
            raise
        _run([*pip, TORCH_CPU, "--index-url", CPU_INDEX], progress)


def _run(command: Sequence[str], progress: Progress, hint: str = "is there a network?") -> list[str]:
    """Run it to its end and report what pip downloads; its output. EngineError has its last error."""
    output: list[str] = []
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**environment, **scratch.environment()}, cwd=scratch.empty_folder(),
    )  # fmt: skip
    assert process.stdout
    try:
        for line in process.stdout:
            output.append(line.strip())
            if line.lstrip().startswith(("Downloading ", "Installing collected packages")):
                progress.note("  " + line.strip()[:110])
    finally:
        if process.poll() is None and sys.exc_info()[0]:
            process.terminate()
        process.stdout.close()
        code = process.wait()
    if code:
        errors = [line for line in output if line.startswith("ERROR:")]
        last = (errors or [line for line in output if line] or ["no message"])[-1].removeprefix("ERROR: ")
        name = Path(command[0]).name
        raise EngineError(f"{name} {' '.join(command[1:4])}: {last[:300]}", hint)
    return output
