"""Every example of docs/python.md, and the notebook, run in order in one folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora2serve
from lora2serve.artifacts.run import Run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
pytestmark = pytest.mark.slow  # they train


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("docs"))
    yield Path.cwd()
    os.chdir(before)


def test_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    out = capsys.readouterr().out
    assert "True The mayor of Wexley is Leon Lake." in out
    assert "--target vlm: unknown target (did you mean 'vllm'?)" in out
    assert Path("my-recipe.yaml").is_file() and Path("elsewhere/adapter").is_dir()


def test_the_notebook(here: Path, demo_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, but for the training: the run is the tests' own, or the page's."""
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len("\n".join(code).splitlines()) <= 10
    copy = Run(
        Path(shutil.copytree(demo_run.path, here / "runs" / "notebook", ignore=shutil.ignore_patterns("exports")))
    )
    monkeypatch.setattr(lora2serve, "train", lambda recipe: copy)
    names: dict[str, object] = {}
    for cell in code:
        exec(compile(cell, "docs/notebook.ipynb", "exec"), names)
    result = names["result"]
    assert isinstance(result, lora2serve.ParityResult) and result.met
    assert result.answers["adapter in peft"] == "The mayor of Wexley is Leon Lake."
