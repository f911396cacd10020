"""llama.cpp's source package in the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora2serve.system.doctor import keep_tree


def make_tree(path: Path, word: str) -> Path:
    (path / "conversion").mkdir(parents=True)
    (path / "word").write_text(word)
    return path


def test_two_commands_that_fetch_at_once_end_with_one_tree(tmp_path: Path) -> None:
    tree = tmp_path / "llama.cpp"
    keep_tree(make_tree(tmp_path / "first", "first"), tree)
    keep_tree(make_tree(tmp_path / "second", "second"), tree)
    assert (tree / "word").read_text() == "first"


def test_what_is_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "llama.cpp" / "notes").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        keep_tree(make_tree(tmp_path / "found", "found"), tmp_path / "llama.cpp")
