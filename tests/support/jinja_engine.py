"""llama.cpp's own engine for chat templates, as llama-server runs it: a program of ours around its sources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lora2serve.system.hardware import cache_folder
from tests.support.llama_cpp_source import llama_cpp_dir

PROGRAM = Path(__file__).with_name("render_jinja") / "main.cpp"


def build() -> Path:
    """The program of ``tests/support/render_jinja``; half a minute of the system's compiler, once for a version."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler for llama.cpp's engine for chat templates")
    tree, package = llama_cpp_dir(), find_spec("llama_cpp")
    assert package is not None and package.origin is not None
    library = Path(package.origin).with_name("lib")
    version = hashlib.sha256(PROGRAM.read_bytes() + f"{tree} {library}".encode()).hexdigest()[:12]
    program = cache_folder() / f"render-jinja-{tree.name}-{version}"
    if not program.is_file():
        folders = (tree / "common", tree / "include", tree / "ggml" / "include", tree / "vendor")
        new = program.with_name(f"{program.name}.{os.getpid()}")
        words = ["-std=c++17", "-O0", "-w", *(f"-I{folder}" for folder in folders), str(PROGRAM), "-o", str(new)]
        link = [f"-L{library}", "-lggml-base", f"-Wl,-rpath,{library}"]
        subprocess.run([compiler, *words, *link], check=True)
        new.rename(program)
    return program


class JinjaEngine:
    """The program, running."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(
        self, template: str, conversations: Sequence[Any], tokens: Mapping[str, str], day: date, thinking: bool = True
    ) -> list[str | None]:
        """The prompts on that day; None for a conversation that the template refuses."""
        assert self._process.stdin and self._process.stdout
        noon = int(datetime.combine(day, time(12)).timestamp())
        request = {"template": template, "bos_token": tokens["bos_token"], "eos_token": tokens["eos_token"],
                   "time": noon, "thinking": thinking, "conversations": conversations}  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return list(answer["prompts"])

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)
