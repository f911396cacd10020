"""The same round trip against the real Hub: ``make test-hub`` with HF_TOKEN set to a token that may write."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora2serve import manifest
from lora2serve.hub import pull_check, push
from tests.hub.conftest import export

pytestmark = [
    pytest.mark.hub,
    pytest.mark.skipif(not os.environ.get("HF_TOKEN"), reason="needs HF_TOKEN, a token that may write"),
]


@pytest.fixture
def repository() -> Iterator[str]:
    """A private repository of the token's user, removed at the end."""
    from huggingface_hub import HfApi

    api = HfApi()
    name = f"{api.whoami()['name']}/lora2serve-test-{uuid.uuid4().hex[:8]}"
    try:
        yield name
    finally:
        api.delete_repo(name, missing_ok=True)


@pytest.mark.parametrize(("target", "quant"), [("vllm", None), ("adapter", None), ("gguf", "Q8_0")])
def test_round_trip(repository: str, tmp_path: Path, target: str, quant: str | None) -> None:
    path = export(tmp_path, target, quant)
    push([path], repo_id=repository, single_repo=True, private=True)
    push([path], repo_id=repository, single_repo=True, private=True)
    checked = pull_check(repository)
    for name in manifest.read(path)["files"]:
        assert (checked.path / name).read_bytes() == (path / name).read_bytes()
