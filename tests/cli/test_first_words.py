"""What takes long says so at once: before the libraries are loaded, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lora2serve.artifacts.lineage import BaseRecord
from tests.support.manifests import write_export

PROGRAM = """
import sys
from lora2serve.progress import Silent

class FirstNote(Silent):
    def note(self, text):
        print(text)
        sys.exit(9 if {"torch", "transformers", "numpy", "datasets"} & sys.modules.keys() else 7)

import lora2serve
for call in {calls!r}:
    try:
        exec(call)
    except SystemExit as end:
        print(end)
"""
FIRST = {
    "lora2serve.train('demo', progress=FirstNote())": "training demo: loading the libraries",
    "lora2serve.parity('export', progress=FirstNote())": "parity of base: 2 comparisons; loading the libraries",
    "lora2serve.export('export', targets='gguf', calibrate='x.jsonl', progress=FirstNote())": (
        "calibrating on x.jsonl: loading the libraries"
    ),
}


def said(calls: list[str], folder: Path) -> list[str]:
    program = PROGRAM.replace("{calls!r}", repr(calls))
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_before_the_libraries(tmp_path: Path) -> None:
    """In one process, in which none of these may load them."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    write_export(tmp_path / "export", "vllm", base=BaseRecord(path=str(tmp_path / "base"), id="org/base"))
    assert said(list(FIRST), tmp_path) == [line for words in FIRST.values() for line in (words, "7")]


def test_the_control(tmp_path: Path) -> None:
    assert said(["import numpy; FirstNote().note('late')"], tmp_path) == ["late", "9"]
