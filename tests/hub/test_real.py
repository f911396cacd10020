"""The same round trip against the real Hub: ``make test-hub`` with HF_TOKEN set to a token that may write."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora2serve.artifacts.export_dir import Export
from lora2serve.hub import pull_check, push, upload
from lora2serve.hub.push import SUFFIX
from tests.hub.conftest import export

pytestmark = [
    pytest.mark.hub,
    pytest.mark.skipif(not os.environ.get("HF_TOKEN"), reason="needs HF_TOKEN, a token that may write"),
]


@pytest.fixture
def repository() -> Iterator[str]:
    """A name for private repositories of the token's user, removed at the end."""
    from huggingface_hub import HfApi

    api = HfApi()
    name = f"{api.whoami()['name']}/lora2serve-test-{uuid.uuid4().hex[:8]}"
    try:
        yield name
    finally:
        for suffix in SUFFIX.values():
            api.delete_repo(name + suffix, missing_ok=True)


def same(repository: str, path: Path, revision: str | None = None) -> None:
    checked = pull_check(repository, revision)
    assert not checked.unlisted_files
    for name in Export.open(path).manifest.files:
        assert (checked.path / name).read_bytes() == (path / name).read_bytes()


@pytest.mark.parametrize(("target", "quant"), [("vllm", None), ("adapter", None), ("gguf", "Q8_0")])
def test_round_trip(repository: str, tmp_path: Path, target: str, quant: str | None) -> None:
    path = export(tmp_path, target, quant)
    first = push([path], repo_id=repository, private=True)[0]
    again = push([path], repo_id=repository, private=True)[0]
    assert (again.commit, again.uploaded) == (first.commit, {})
    same(first.repo_id, path)


def test_several_commits(repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a pull request, verified by the Hub's own object ids, and merged: main moves once."""
    monkeypatch.setattr(upload, "FILES_PER_COMMIT", 2)
    path = export(tmp_path, "vllm")
    push([path], repo_id=repository, private=True)
    same(repository, path)


def test_branch_and_pull_request(repository: str, tmp_path: Path) -> None:
    path = export(tmp_path, "vllm")
    push([path], repo_id=repository, private=True, revision="v2")
    same(repository, path, "v2")
    left_open = push([path], repo_id=repository, private=True, create_pr=True)[0]
    assert left_open.pull_request and left_open.pull_request.endswith("/discussions/1")
    same(repository, path, "refs/pr/1")
