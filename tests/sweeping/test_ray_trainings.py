"""Trainings on Ray's own test cluster: two nodes of one core each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.errors import UsageError
from tests.support.commands import ROOT, run_command
from tests.support.runs import fit, logged, make_chat_model, recipe_file, uneven_data

pytestmark = pytest.mark.engine

NICENESS = "RAY_worker_niceness"  # as Ray spells it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes ``a.yaml`` and ``b.yaml``, and ``broken.yaml``, whose data is no JSON."""
    folder = tmp_path_factory.mktemp("ray")
    base = make_chat_model(folder / "base")
    data = uneven_data(folder, 12, 6)
    for name, seed in (("a", 1), ("b", 2)):
        file = recipe_file(folder / name, base, data, quantize="none", steps=4, batch_size=2, seed=seed)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **yaml.safe_load(file.read_text())}))
    (folder / "rows.jsonl").write_text("none\n")
    broken = yaml.safe_load((folder / "a.yaml").read_text()) | {"name": "broken", "data": {"train": "rows.jsonl"}}
    (folder / "broken.yaml").write_text(yaml.safe_dump(broken))
    return folder


@pytest.fixture(scope="module")
def port() -> int:
    """Of the head's server for Ray's client."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free: int = server.getsockname()[1]
    return free


@pytest.fixture(scope="module")
def cluster(port: int) -> Iterator[dict[str, str]]:
    """The environment of its drivers."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ[NICENESS] = "0"  # else they wait for every other test
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False, "ray_client_server_port": port,
        },
    )  # fmt: skip
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    try:
        yield {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": str(cluster.address)}
    finally:
        cluster.shutdown()
        del os.environ[NICENESS]


def train(folder: Path, environment: dict[str, str], *words: str, on: str = "ray") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora2serve", "train", *words, "--on", on]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def adapter(run: Run) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(run.adapter / "adapter_model.safetensors")
    return tensors


@pytest.mark.slow
def test_two_recipes_at_once(folder: Path, cluster: dict[str, str]) -> None:
    """Each on a node, and each the run that it is without Ray."""
    done = train(folder, cluster, "a.yaml", "b.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["runs/a", "runs/b"]
    begun = [done.stderr.index(f"{name}.yaml: begins on Ray (1 core)") for name in "ab"]
    ended = [done.stderr.index(f"{name}.yaml: step 4 of 4") for name in "ab"]
    assert max(begun) < min(ended), "at the same time"
    for name in "ab":
        run = Run(folder / "runs" / name)
        alone = fit(folder / f"{name}.yaml", into=folder / f"alone-{name}")[0]
        assert run.record.finished and logged(run) == logged(alone)
        mine, other = adapter(run), adapter(alone)
        assert all(torch.equal(mine[key], other[key]) for key in other)


@pytest.mark.slow
def test_one_that_fails_leaves_the_others(folder: Path, cluster: dict[str, str]) -> None:
    done = train(folder, cluster, "a.yaml", "broken.yaml", "--set", "train.steps=1", "--json")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    outcomes = {line["recipe"]: line["state"] for line in map(json.loads, done.stdout.splitlines())}
    assert outcomes == {"a.yaml": "finished", "broken.yaml": "failed"}
    error = done.stderr[done.stderr.index("error:") :]
    assert error.startswith("error: 1 of 2 trainings failed") and "broken.yaml: " in error and "rows.jsonl" in error


@pytest.mark.slow
def test_one_recipe_on_two_ranks(folder: Path, cluster: dict[str, str]) -> None:
    """One run directory; and more than the cluster has is refused."""
    done = train(folder, cluster, "b.yaml", "--gpus", "2", "--json", "--set", "data.packing=false")
    assert done.returncode == 0, done.stderr
    (outcome,) = [json.loads(line) for line in done.stdout.splitlines()]
    run = Run(folder / outcome["run"])
    assert done.stderr.count("b.yaml: 4 steps on cpu by 2 processes") == 1
    loop = run.record.loop
    assert loop is not None and (loop.processes, loop.rows) == (2, 1)
    alone = fit(folder / "b.yaml", into=folder / "alone-of-two")[0]
    mine, other = adapter(run), adapter(alone)
    assert max(float((mine[key] - other[key]).abs().max()) for key in other) < 1e-6
    refused = train(folder, cluster, "b.yaml", "--gpus", "3")
    assert refused.returncode == 1 and "--gpus 3: the Ray cluster has 2 cores" in refused.stderr


@pytest.mark.slow
def test_by_rays_client(folder: Path, cluster: dict[str, str], port: int) -> None:
    """From a machine that is no node (``ray://``): two recipes at once, then one on two ranks, as without it."""
    elsewhere = {name: value for name, value in cluster.items() if name != "RAY_ADDRESS"}
    on = f"ray://127.0.0.1:{port}"
    done = train(folder, elsewhere, "a.yaml", "b.yaml", "--json", on=on)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for line in map(json.loads, done.stdout.splitlines()):
        name = Path(line["recipe"]).stem
        assert done.stderr.count(f"{name}.yaml: step 4 of 4") == 1
        mine = adapter(Run(folder / line["run"]))
        other = adapter(fit(folder / f"{name}.yaml", into=folder / f"alone-{name}-by-client")[0])
        assert all(torch.equal(mine[key], other[key]) for key in other)
    assert "ray.init" not in done.stderr, "Ray's own words"
    done = train(folder, elsewhere, "a.yaml", "--gpus", "2", "--json", "--set", "data.packing=false", on=on)
    assert done.returncode == 0, done.stderr
    loop = Run(folder / json.loads(done.stdout)["run"]).record.loop
    assert loop is not None and loop.processes == 2
    failed = train(folder, elsewhere, "broken.yaml", on=on)
    assert failed.returncode == 1 and "rows.jsonl" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("by_client", [False, True])
def test_stopped_and_resumed(folder: Path, cluster: dict[str, str], port: int, by_client: bool) -> None:
    on, name = (f"ray://127.0.0.1:{port}", "long-by-client") if by_client else ("ray", "long")
    command = [sys.executable, "-m", "lora2serve", "train", "a.yaml", "--on", on, "--set", "train.steps=120"]
    child = subprocess.Popen(
        [*command, "--set", f"name={name}"], cwd=folder, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    log = folder / "runs" / name / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=150)
    assert (child.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    run = Run(folder / "runs" / name)
    assert run.has_checkpoint and not run.record.finished
    step = max(logged(run))
    done = train(folder, cluster, "--resume", f"runs/{name}", on=on)
    assert (done.returncode, done.stdout) == (0, f"runs/{name}\n"), done.stderr
    assert step < 120 and list(logged(run)) == list(range(1, 121))


def test_what_cannot_be(folder: Path, tmp_path: Path) -> None:
    for words, problem in (
        (("a.yaml", "b.yaml", "--on", "ray", "--jobs", "2"), "Ray says what runs where"),
        (("a.yaml", "--on", "ray", "--gpus", "all"), "--gpus all: on Ray, expected a number"),
        (("a.yaml", "--on", "ray", "--name", "x"), "--on ray and --name"),
        (("a.yaml", "--on", "spark"), "--on spark: expected ray, or ray://HOST:PORT of a cluster's head\n"),
        (
            ("a.yaml", "--on", "rya"),
            "--on rya: expected ray, or ray://HOST:PORT of a cluster's head (did you mean 'ray'?)",
        ),
        (("--on", "ray", "--resume"), "--on ray and --resume: name the run"),
    ):
        refused = run_command(["train", *words], folder)
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
        assert problem in refused.stderr, refused.stderr
    with pytest.raises(UsageError, match="gpus: 2, expected at least 1, with on"):
        lora2serve.train_many([folder / "a.yaml"], gpus=2)
    pytest.importorskip("ray")
    missing = run_command(
        ["train", "a.yaml", "--on", "ray"], folder, {"RAY_ADDRESS": "127.0.0.1:1", "TMPDIR": str(tmp_path)}
    )
    assert missing.returncode == 1 and "no Ray cluster" in missing.stderr, missing.stderr
