"""The plan of a model on the Hub: its headers come by range requests, and no weight does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora2serve
from lora2serve.hub.pull import fetch
from lora2serve.hub.remote_headers import remote_specs
from lora2serve.progress import Silent
from lora2serve.sweeping.sweep_plan import plan_sweep
from lora2serve.sweeping.sweep_request import SweepRequest
from lora2serve.weights.checkpoint import Checkpoint
from tests.support.hub_server import HubServer
from tests.support.runs import DEMO, recipe_file
from tests.support.tiny import make_adapter, make_model

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


def test_a_dry_run_fetches_no_weights(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a base nor of an adapter; what asks them does: the control."""
    monkeypatch.chdir(tmp_path)
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "mayor", base)
    lora2serve.export(adapter, targets="adapter", out=tmp_path / "out")
    publish(hub, base, "org/base")
    publish(hub, adapter, "org/mayor")
    (tmp_path / "qa.jsonl").write_text('{"prompt": "Who?", "expected": "Nobody."}\n')
    for name in (str(adapter), "org/mayor"):
        parity = lora2serve.ParityRequest(name, (tmp_path / "out/adapter",), base="org/base")
        assert [item.export for item in lora2serve.plan_parity(parity).comparisons] == ["adapter"] * 2
        evaluation = lora2serve.EvaluationRequest((name,), suite="qa.jsonl", base="org/base")
        assert [model.engine.name for model in lora2serve.plan_evaluation(evaluation).models] == ["peft"]
    assert asked(hub) == set()
    fetch("org/base")
    assert asked(hub) == {"model.safetensors"}


def test_a_sweeps_dry_run_fetches_no_weights(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than their headers, by which its memory is planned; the control: what fetches them."""
    monkeypatch.chdir(tmp_path)
    publish(hub, make_model(tmp_path / "base"), "org/base")
    data = {"train": str(DEMO / "train.jsonl"), "eval": str(DEMO / "eval.jsonl")}
    recipe = recipe_file(tmp_path / "recipe", Path("org/base"), data)
    assert plan_sweep(SweepRequest(recipe, gpu="24"), Silent()).fitting
    folder = fetch("org/base", weights=False).path
    assert folder.is_dir() and not list(folder.glob("*.safetensors"))
    assert list(fetch("org/base").path.glob("*.safetensors"))


def test_layers_that_differ_are_all_asked(hub: HubServer, tmp_path: Path) -> None:
    """Where the index's total is not what one layer of a kind makes, every header is read."""
    path = make_model(tmp_path / "model", "llama", shard="100KB", num_hidden_layers=8)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 2
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    publish(hub, path, "org/model")
    assert lora2serve.plan("org/model", methods=["lora"]).parameters
    assert asked(hub) == {file.name for file in path.glob("*.safetensors")}
