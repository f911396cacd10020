"""Versions on a tracking server of MLflow: a small one, and a real one with MLflow's own client as the judge."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve import Lora2ServeError, Registry
from lora2serve.cli import run as command_line
from lora2serve.errors import UsageError
from lora2serve.progress import Silent
from lora2serve.registry.mlflow_server import MlflowServer
from tests.support.environments import make_environment
from tests.support.mlflow_tracking import MLFLOW, real_mlflow, small_mlflow
from tests.support.registries import add_export, make_run, scores

ADAPTER = "adapter/adapter_model.safetensors"
# What MLflow's own client has: the files of an alias, its description of the model, tags, parameters, metrics.
READ = """
import json, sys, pathlib, mlflow
from mlflow import MlflowClient
from mlflow.models import Model
uri, name, folder = sys.argv[1:]
mlflow.set_tracking_uri(uri)
client = MlflowClient()
version = client.get_model_version_by_alias(name, "champion")
run = client.get_run(version.run_id)
place = pathlib.Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=folder))
print(json.dumps({
    "tags": version.tags, "description": version.description, "flavors": Model.load(str(place)).flavors,
    "params": run.data.params, "metrics": run.data.metrics, "status": run.info.status, "run": run.info.run_name,
    "history": [one.value for one in client.get_metric_history(version.run_id, "medqa.acc")],
    "files": sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()), "place": str(place),
    "versions": [one.tags["lora2serve.version"] for one in client.search_model_versions(f"name='{name}'")],
    "runs": len(client.search_runs([run.info.experiment_id])),
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow") / "environment"
    make_environment(folder, MLFLOW)
    return folder


@pytest.fixture(params=["small", pytest.param("real", marks=pytest.mark.slow)])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "small":
        with small_mlflow() as (url, _):
            yield url
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with real_mlflow(request.getfixturevalue("environment"), tmp_path / "server", port) as url:
        yield url


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry", author="tester") as opened:
        yield opened


def add(registry: Registry, folder: Path, seed: int, *, proven: bool = True) -> None:
    run = make_run(folder / f"run-{seed}", seed)
    add_export(run, proven=proven)
    registry.add(run.path, name="medical-qa", domain="medical", note=f"note {seed}", unproven=not proven)


def test_versions_become_versions(
    address: str,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Sent once, moved and measured later; what is not proven stays here. The control: another registry is refused."""
    for seed, proven in enumerate((True, False, True)):
        add(registry, tmp_path, seed, proven=proven)
    registry.promote("medical-qa@1")
    to = f"mlflow:{address}/"
    planned = registry.sync("medical-qa", to=to, dry_run=True, progress=Silent())
    assert planned.changes == (
        "register medical-qa", "send medical-qa@1", "send medical-qa@3", "move medical-qa@champion - -> 1",
    )  # fmt: skip
    assert MlflowServer(address).model("medical-qa") is None and not (tmp_path / "registry" / "versions").exists()
    synced = registry.sync("medical-qa", to=to, progress=Silent())
    assert synced.pushed == ("medical-qa@1", "medical-qa@3") and synced.moved == ("medical-qa@champion",)
    assert planned == replace(synced, dry_run=True)
    assert synced.left_out == ("medical-qa@2: vllm: parity was not run",) and synced.to == f"mlflow:{address}"
    server = MlflowServer(address)
    there = {version.tags["lora2serve.version"]: version for version in server.versions("medical-qa")}
    assert sorted(there) == ["medical-qa@1", "medical-qa@3"]
    model = server.model("medical-qa")
    assert model is not None and model.aliases == {"champion": there["medical-qa@1"].number}
    assert there["medical-qa@3"].tags["lora2serve.sha256"] == registry.get("medical-qa@3").sha256
    assert there["medical-qa@3"].tags["lora2serve.exports"] == "vllm"
    assert registry.sync("medical-qa", to=to, progress=Silent()).pushed == (), "again: nothing is new"

    registry.promote("medical-qa@3")
    registry.promote("medical-qa@1", "not.there")  # MLflow has no dot in an alias
    registry.retire("medical-qa@2")
    registry.score("medical-qa@3", scores(tmp_path, 0.8, created="2026-08-16T00:00:00Z"))
    registry.add(add_export(make_run(tmp_path / "again" / "run-2", 2), "gguf", quant="Q8_0"), name="medical-qa")
    monkeypatch.setenv("LORA2SERVE_REGISTRY", str(tmp_path / "registry"))
    assert command_line(["registry", "sync", "medical-qa", "--to", to, "--dry-run"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "update medical-qa@3: scores, exports", "move medical-qa@champion 1 -> 3",
    ]  # fmt: skip
    after = {version.tags["lora2serve.version"]: version for version in server.versions("medical-qa")}
    assert after == there, "nothing is written there"
    assert command_line(["registry", "sync", "medical-qa", "--to", to]) == 0
    out, err = capfd.readouterr()
    assert out == "medical-qa@champion\n" and "medical-qa@not.there: not sent: MLflow has no alias of that name" in err
    assert command_line(["registry", "sync", "medical-qa", "--to", to, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["moved"] == []
    after = {version.tags["lora2serve.version"]: version for version in server.versions("medical-qa")}
    assert after["medical-qa@3"].tags["lora2serve.exports"] == "vllm gguf-Q8_0"
    registry.promote("medical-qa@1", "staging")
    assert registry.sync("medical-qa", to=to, progress=Silent()).moved == ("medical-qa@staging",)
    registry.unset("medical-qa@staging")
    planned = registry.sync("medical-qa", to=to, dry_run=True, progress=Silent())
    assert planned.changes == ("move medical-qa@staging 1 -> -",)
    assert registry.sync("medical-qa", to=to, progress=Silent()).moved == ("medical-qa@staging",)
    model = server.model("medical-qa")
    assert model is not None and model.aliases == {"champion": there["medical-qa@3"].number}, "unset here, gone there"
    if "real" in request.node.name:
        as_mlflow_has_it(request.getfixturevalue("environment"), address, tmp_path / "run-2", tmp_path / "got")

    with Registry(tmp_path / "other") as other:
        add(other, tmp_path / "others", 7)
        for dry_run in (True, False):
            with pytest.raises(UsageError, match="another content, so it is of another registry"):
                other.sync("medical-qa", to=to, dry_run=dry_run, progress=Silent())
    server.create_model("towns", {})
    registry.add(tmp_path / "run-0", name="towns")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="a registered model towns is there, and not from lora2serve"):
            registry.sync("towns", to=to, dry_run=dry_run, progress=Silent())
    server.close()


def as_mlflow_has_it(environment: Path, address: str, run: Path, folder: Path) -> None:
    command = [str(environment / "bin" / "python"), "-c", READ, address, "medical-qa", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["flavors"]["lora2serve"]["version"] == "medical-qa@3" == seen["tags"]["lora2serve.version"]
    assert (seen["description"], seen["status"], seen["run"]) == ("note 2", "FINISHED", "medical-qa-3")
    assert seen["params"] == {
        "base": "org/base", "method": "LORA", "rank": "4", "alpha": "8.0", "learning_rate": "0.0002", "steps": "10",
        "rows": "102",
    }  # fmt: skip
    assert seen["metrics"] == {"heldout.loss": 1.02, "heldout.perplexity": 2.0, "medqa.acc": 0.8}
    assert seen["history"] == [0.8], "sent twice, and there once"
    assert seen["versions"].count("medical-qa@3") == 1 and seen["runs"] == 2
    place = Path(seen["place"])
    assert (place / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()
    assert {"MLmodel", "run.json", "exports/vllm/lora2serve.json", "exports/gguf-Q8_0/model.gguf"} <= set(seen["files"])
    with Registry(folder / "registry") as back:
        assert back.add(place, name="back").sha256 == seen["tags"]["lora2serve.sha256"], "it is a run again"


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sync_that_broke_off_is_completed(registry: Registry, tmp_path: Path, every: int) -> None:
    """Whichever request fails, the next sync makes one version of one run. The control: an unbroken one does the same."""
    add(registry, tmp_path, 0)
    registry.promote("medical-qa@1")
    with small_mlflow() as (url, whole):
        registry.sync("medical-qa", to=f"mlflow:{url}", progress=Silent())
    endpoints = sorted(set(whole.calls))
    assert len(endpoints) == 12 and "upload" in endpoints
    for endpoint in endpoints[every - 1 :: every]:
        with small_mlflow() as (url, mlflow):
            mlflow.failing[endpoint] = 1
            with pytest.raises(Lora2ServeError, match="503: try again"):
                registry.sync("medical-qa", to=f"mlflow:{url}", progress=Silent())
            registry.sync("medical-qa", to=f"mlflow:{url}", progress=Silent())
            assert (mlflow.models, mlflow.files, mlflow.runs) == (whole.models, whole.files, whole.runs), endpoint


def test_a_dry_run_only_asks(registry: Registry, tmp_path: Path) -> None:
    """Before and after each sync: what the server holds stays as it is. The control: the sync itself changes it."""
    add(registry, tmp_path, 0)
    registry.promote("medical-qa@1")
    with small_mlflow() as (url, mlflow):
        for turn in range(2):
            before = json.dumps([mlflow.models, mlflow.experiments, mlflow.runs, sorted(mlflow.files)])
            mlflow.calls.clear()
            planned = registry.sync("medical-qa", to=f"mlflow:{url}", dry_run=True, progress=Silent())
            assert set(mlflow.calls) <= {"registered-models/get", "model-versions/search"}
            assert json.dumps([mlflow.models, mlflow.experiments, mlflow.runs, sorted(mlflow.files)]) == before
            synced = registry.sync("medical-qa", to=f"mlflow:{url}", progress=Silent())
            assert synced.changes == planned.changes and bool(synced.changes) == (turn == 0)
            after = json.dumps([mlflow.models, mlflow.experiments, mlflow.runs, sorted(mlflow.files)])
            assert (after != before) == (turn == 0)


def test_what_is_no_server(registry: Registry, tmp_path: Path) -> None:
    add(registry, tmp_path, 0)
    for to, message in {
        "mlflow:": "unknown kind of place", "mlflow:host": "expected http://host:port", "mlflow": "unknown kind",
        "mlflow:http://127.0.0.1:1": "no answer", "dvc:x": "unknown kind of place$",
        "hubb:you/x": r"unknown kind of place \(did you mean 'hub:'\?\)$",
    }.items():  # fmt: skip
        with pytest.raises(Lora2ServeError, match=message):
            registry.sync("medical-qa", to=to, progress=Silent())
    with small_mlflow() as (url, mlflow):
        registry.sync("medical-qa", to=f"mlflow:{url}", progress=Silent())
        mlflow.runs[0]["info"]["artifact_uri"] = "s3://bucket/run"
        mlflow.models["medical-qa"]["versions"].clear()
        with pytest.raises(UsageError, match="keeps files at s3, where only its own clients write"):
            registry.sync("medical-qa", to=f"mlflow:{url}", progress=Silent())
    with pytest.raises(Lora2ServeError, match="no versions of that name"):
        registry.sync("nothing", to="mlflow:http://127.0.0.1:1", progress=Silent())
