"""A base and a data set by their Hub names: the commit, subset and splits that the recipe asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora2serve.artifacts.run import Run
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import data_sets
from lora2serve.errors import DataError
from tests.support.hub_server import HubServer
from tests.support.runs import plain, recipe_file, rows, write_jsonl

pytestmark = pytest.mark.engine

CARD = """---
configs:
- config_name: talk
  data_files:
  - {split: train, path: talk/train.jsonl}
  - {split: test, path: talk/test.jsonl}
- config_name: other
  data_files: other.jsonl
---
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set's directory, as on the Hub: two subsets, one of them with two splits."""
    root = tmp_path_factory.mktemp("set") / "chats"
    (root / "talk").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    write_jsonl(root / "talk" / "train.jsonl", rows("train.jsonl", 12))
    write_jsonl(root / "talk" / "test.jsonl", rows("eval.jsonl", 5))
    write_jsonl(root / "other.jsonl", [{"text": "something else"}, {"txet": "a typo"}])
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_subset_and_splits(layout: Path) -> None:
    talk = data_sets.load(DataRecipe(train=str(layout), subset="talk", eval_split="test"))
    assert talk.held_out is not None
    assert (plain(talk.train), plain(talk.held_out)) == (rows("train.jsonl", 12), rows("eval.jsonl", 5))
    assert talk.train.where(3) == f"{layout}:3"
    other = data_sets.load(DataRecipe(train=str(layout), subset="talk", split="test"))
    assert other.train.rows == talk.held_out.rows
    share = data_sets.load(DataRecipe(train=str(layout), subset="talk", eval_split=0.25))
    assert share.held_out is not None
    assert (len(share.train.rows), len(share.held_out.rows)) == (9, 3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "talk"),  # which subset? the message lists them
        ({"subset": "tlak"}, "tlak"),
        ({"subset": "talk", "split": "tset"}, "tset"),
        ({"subset": "talk", "eval_split": "valid"}, "valid"),
        ({"subset": "other"}, "keys txet, expected messages"),
    ],
)
def test_a_part_that_is_not_there(layout: Path, asked: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        data_sets.load(DataRecipe(train=str(layout), **asked))
    assert caught.value.hint
    assert len(caught.value.message.splitlines()) <= 2


def test_a_file_has_no_splits(layout: Path) -> None:
    with pytest.raises(DataError, match=r"data\.eval_split: test, but .* is a file"):
        data_sets.load(DataRecipe(train=str(layout / "talk" / "train.jsonl"), eval_split="test"))


def test_both_by_their_hub_names(tmp_path: Path, layout: Path, small: Path) -> None:
    """The whole command, from a Hub: the base at a tag whose branch has moved on, a subset and a split of a set."""
    with HubServer(tmp_path / "hub") as hub:
        tagged = hub.add("acme/base", {path.name: path.read_bytes() for path in small.iterdir()})
        hub.repos["acme/base"].refs["v1"] = tagged.oid
        hub.add("acme/base", {"model.safetensors": b"moved on"})
        files = {str(path.relative_to(layout)): path.read_bytes() for path in layout.rglob("*") if path.is_file()}
        hub.add("datasets/acme/chats", files)
        file = recipe_file(
            tmp_path, Path("acme/base"), {"train": "acme/chats", "subset": "talk", "eval_split": "test"}, steps=1
        )
        words = [sys.executable, "-m", "lora2serve", "train", "--set", "model.revision=v1"]
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_DATASETS_OFFLINE": "0"}
        done = subprocess.run(words, cwd=file.parent, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, (done.stderr, [request.path for request in hub.requests])
    run = Run(tmp_path / done.stdout.strip())
    base = run.record.base
    assert (base.id, base.revision) == ("acme/base", tagged.oid), "--resume takes the same commit"
    assert (run.record.data.train.rows, run.record.data.eval.rows) == (12, 5)
    assert [json.loads(line) for line in run.eval_data.read_text().splitlines()] == rows("eval.jsonl", 5)


def test_a_revision_of_a_directory(tmp_path: Path, small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from lora2serve.cli import run

    file = recipe_file(tmp_path, small, {"train": str(write_jsonl(tmp_path / "t.jsonl", rows("train.jsonl", 2)))})
    assert run(["train", str(file), "--set", "model.revision=main"]) == 2
    assert f"model.revision: main, but {small} is a directory" in capfd.readouterr().err
