"""What takes long says so at once: before the libraries are loaded, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
{call}
"""


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("lora2serve.train('demo', progress=FirstNote())", "training demo: loading the libraries"),
        ("lora2serve.parity('export', progress=FirstNote())", "parity of base: 2 comparisons; loading the libraries"),
        (
            "lora2serve.export('export', targets='gguf', calibrate='x.jsonl', progress=FirstNote())",
            "calibrating on x.jsonl: loading the libraries",
        ),
    ],
    ids=["train", "parity", "calibrate"],
)
def test_before_the_libraries(call: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    write_export(tmp_path / "export", "vllm", base=BaseRecord(path=str(tmp_path / "base"), id="org/base"))
    program = PROGRAM.replace("{call}", call)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (7, words), done.stderr


def test_the_control(tmp_path: Path) -> None:
    program = PROGRAM.replace("{call}", "import numpy; FirstNote().note('late')")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 9
