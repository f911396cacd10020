"""The plan of a model on the Hub: its headers come by range requests, and no weight does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora2serve
from lora2serve.hub.pull import fetch
from lora2serve.hub.remote_headers import remote_specs
from lora2serve.progress import Silent
from lora2serve.weights.checkpoint import Checkpoint
from tests.support.hub_server import HubServer
from tests.support.tiny import make_model

pytestmark = pytest.mark.engine


def publish(hub: HubServer, path: Path, repo: str) -> None:
    hub.add(repo, {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})


def asked(hub: HubServer) -> set[str]:
    """Names of the weight files that were asked for."""
    return {request.path.rsplit("/", 1)[-1] for request in hub.requests if request.path.endswith(".safetensors")}


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_headers_alone(hub: HubServer, tmp_path: Path, shard: str) -> None:
    """As many requests as there are kinds of tensors; each tensor is known as it is stored."""
    path = make_model(tmp_path / "model", "llama", shard=shard, num_hidden_layers=8)
    publish(hub, path, "org/model")
    plan = lora2serve.plan("org/model", methods=["qlora"])
    folder = fetch("org/model", weights=False)
    specs = remote_specs("org/model", str(folder.commit), folder.path, Silent())
    local = Checkpoint(path).specs()
    assert sorted(specs, key=lambda spec: spec.name) == sorted(local, key=lambda spec: spec.name)
    assert plan.parameters == sum(spec.numel for spec in local)
    files = len(list(path.glob("*.safetensors")))
    assert asked(hub) and (files == 1 or len(asked(hub)) < files)
    assert not list(folder.path.glob("*.safetensors"))


def test_layers_that_differ_are_all_asked(hub: HubServer, tmp_path: Path) -> None:
    """Where the index's total is not what one layer of a kind makes, every header is read."""
    path = make_model(tmp_path / "model", "llama", shard="100KB", num_hidden_layers=8)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 2
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    publish(hub, path, "org/model")
    assert lora2serve.plan("org/model", methods=["lora"]).parameters
    assert asked(hub) == {file.name for file in path.glob("*.safetensors")}
