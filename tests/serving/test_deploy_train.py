"""Jobs that train a recipe elsewhere: what the published schemas say, and that the launchers' lines really train."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.cli import run
from lora2serve.config import recipe as recipes
from lora2serve.errors import UsageError
from lora2serve.serving.deploy.jobs import JOB_KINDS
from lora2serve.serving.deploy.server_spec import LONGEST_LABEL, label
from tests.serving.test_deploy import judge, put
from tests.support.commands import ROOT
from tests.support.ranks import launched
from tests.support.runs import make_chat_model, recipe_file, uneven_data

SIZES = ((1, 1), (2, 8))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    file = recipe_file(folder, folder / "base", {"train": str(folder / "train.jsonl")}, batch_size=16)
    content = {"name": "My_Run", **yaml.safe_load(file.read_text())}
    file.write_text(yaml.safe_dump(content))
    (folder / "train.jsonl").write_text("{}\n")
    return file


def rendered(kind: str, recipe: Path, nodes: int, gpus: int) -> str:
    gpu = "H100" if kind == "skypilot" else None
    return lora2serve.deploy_training(kind, recipe, nodes=nodes, gpus=gpus, gpu=gpu)  # type: ignore[arg-type]


def documents(kind: str, recipe: Path, nodes: int = 2, gpus: int = 8) -> list[dict[str, Any]]:
    return list(yaml.load_all(rendered(kind, recipe, nodes, gpus), yaml.CSafeLoader))


of_many = cache(documents)


def validate(kind: str, content: list[dict[str, Any]]) -> None:
    for document in content:
        judge("skypilot" if kind == "skypilot" else "", document.get("kind", "")).validate(document)


@pytest.mark.parametrize("kind", [kind for kind in JOB_KINDS if kind != "slurm"])
@pytest.mark.parametrize(("nodes", "gpus"), SIZES)
def test_schema(kind: str, nodes: int, gpus: int, recipe: Path) -> None:
    validate(kind, documents(kind, recipe, nodes, gpus))


POD = ("spec", "runtimePatches", 0, "trainingRuntimeSpec", "template", "spec", "replicatedJobs", 0, "template", "spec",
       "template", "spec")  # fmt: skip
FAULTS: list[tuple[str, Callable[[list[dict[str, Any]]], None]]] = [
    ("k8s", put(2, "spec", "completions", "2")),
    ("k8s", put(2, "spec", "template", "spec", "subDomain", "x")),
    ("k8s", put(2, "spec", "template", "spec", "containers", 0, "resource", {})),
    ("k8s", put(1, "spec", "ports", 0, "port", "29400")),
    ("k8s", put(0, "data", "recipe.yaml", {})),
    ("kubeflow", put(1, "spec", "runtimeRef", "torch-distributed")),
    ("kubeflow", put(1, "spec", "trainer", "numNodes", "2")),
    ("kubeflow", put(1, "spec", "trainer", "nodes", 2)),
    ("kubeflow", put(1, *POD, "volumes", 0, "persistentVolumeClaim", {})),
    ("kubeflow", put(1, *POD, "containers", 0, "volumeMount", [])),
    ("skypilot", put(0, "nodes", 2)),
    ("skypilot", put(0, "resources", "gpus", 8)),
    ("skypilot", put(0, "num_nodes", "2")),
]


@pytest.mark.parametrize(("kind", "fault"), FAULTS)
def test_the_schemas_see_a_fault(kind: str, fault: Callable[[list[dict[str, Any]]], None], recipe: Path) -> None:
    content = copy.deepcopy(of_many(kind, recipe))
    validate(kind, content)
    fault(content)
    with pytest.raises(jsonschema.ValidationError):
        validate(kind, content)


def test_what_the_jobs_say(recipe: Path, tmp_path: Path) -> None:
    """Two machines of eight GPUs: the launcher's words, and the recipe as the cluster keeps it."""
    config, service, job = documents("k8s", recipe)
    (tmp_path / "again.yaml").write_text(config["data"]["recipe.yaml"])
    assert recipes.load(tmp_path / "again.yaml") == recipes.load(recipe)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": "my-run"}
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (job["spec"]["completions"], job["spec"]["completionMode"], pod["subdomain"]) == (2, "Indexed", "my-run")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["args"][0].endswith(
        'exec torchrun --nproc-per-node 8 --nnodes 2 --node-rank "$JOB_COMPLETION_INDEX" --master-addr my-run-0.my-run '
        "--master-port 29400 -m lora2serve train /recipe/recipe.yaml"
    )
    alone = documents("k8s", recipe, 1, 1)
    assert [each["kind"] for each in alone] == ["ConfigMap", "Job"], "one machine needs no Service"
    _, train_job = documents("kubeflow", recipe)
    trainer = train_job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    (task,) = documents("skypilot", recipe)
    assert task["resources"] == {"accelerators": "H100:8"} and task["num_nodes"] == 2
    script = rendered("slurm", recipe, 2, 8)
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8"} <= set(script.splitlines())
    for kind in JOB_KINDS:
        text = rendered(kind, recipe, 2, 8)
        assert str(recipe.parent / "train.jsonl") in text and "never run on a cluster" in text


@pytest.mark.parametrize(
    ("name", "expected"), [("3B legal!", "model-3b-legal"), ("Legal_2", "legal-2"), ("§", "model")]
)
def test_the_name_is_one_of_a_service(name: str, expected: str) -> None:
    """RFC 1035: it begins with a letter, and does not end with a hyphen."""
    assert label(name) == expected
    assert len(label("9" * 80)) == LONGEST_LABEL


def test_all_files_of_the_recipe_are_named(recipe: Path, tmp_path: Path) -> None:
    """A chat template and suites are read before the first step, too; a format's name is no file."""
    for name in ("template.jinja", "suite.yaml"):
        (tmp_path / name).write_text("{}")
    content = yaml.safe_load(recipe.read_text())
    content["evaluate"] = {"suites": ["suite.yaml"]}
    for template, named in (("template.jinja", True), ("chatml", False)):
        content["data"]["chat_template"] = template
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
        first = rendered("k8s", tmp_path / "job.yaml", 1, 1).partition("apiVersion")[0]
        assert str(tmp_path / "suite.yaml") in first and (template in first) == named


@pytest.mark.parametrize("kind", JOB_KINDS)
def test_no_path_ends_a_comment(kind: str, recipe: Path, tmp_path: Path) -> None:
    """What stands behind an end of line in a file's name is no command of the script, and no key of the YAML."""
    name = "a\nexit 7\u2028x: 1\r\n#.jsonl"
    (tmp_path / name).write_text("{}\n")
    content = yaml.safe_load(recipe.read_text())
    content["data"]["train"] = name
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    text = rendered(kind, tmp_path / "job.yaml", 1, 1)
    assert r"a\nexit 7\u2028x: 1\r\n#.jsonl" in text
    begun = text.partition("set -euo" if kind == "slurm" else "\napiVersion" if kind != "skypilot" else "\nname:")[0]
    assert all(line.startswith("#") for line in begun.splitlines() if line), begun
    if kind != "slurm":
        validate(kind, list(yaml.safe_load_all(text)))


def test_what_cannot_be(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words, problems in (
        (("kube",), ["kind: 'kube', expected one of", "(did you mean 'kubeflow'?)"]),
        (
            ("slurm", "--image", "x", "--gpu", "H100"),
            ["--gpu: deploy train slurm has no use", "--image: deploy train slurm"],
        ),
        (("k8s", "--nodes", "0", "--gpus", "3"), ["--nodes 0: expected at least 1"]),
        (("k8s", "--gpus", "3"), ["16 rows a step, for 3 processes"]),
        (("k8s", "--store", "s3://x"), ["--store s3://x: expected pvc://CLAIM"]),
        (("skypilot",), ["--gpu names the GPU"]),
        (("skypilot", "--gpu", "H100:8"), ["--gpu 'H100:8': expected the name of a GPU", "--gpus says how many"]),
        (("skypilot", "--gpu", "H100\nx: 1"), [r"--gpu 'H100\nx: 1': expected the name of a GPU"]),
        (("k8s", "--image", "a b"), ["--image 'a b': expected an image"]),
        (("k8s", "--store", ""), ["--store : expected pvc://CLAIM"]),
    ):
        kind, *options = words
        assert run(["deploy", "train", kind, str(recipe), *options]) == 2
        shown = capfd.readouterr()
        assert shown.out == "" and all(problem in shown.err for problem in problems), shown.err
    assert run(["deploy", "train", "slurm", str(recipe)]) == 0
    assert capfd.readouterr().out.startswith("#!/bin/bash\n")
    with pytest.raises(UsageError):
        lora2serve.deploy_training("x", recipe)  # type: ignore[arg-type]


STUBS = {
    "pip": "exit 0",
    "scontrol": "echo 127.0.0.1",  # `show hostnames`: the first machine of the job
    "srun": 'exec "$@"',  # the one task of one machine
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("kind", JOB_KINDS)
def test_the_line_of_the_launcher_trains(kind: str, tmp_path: Path) -> None:
    """What the cluster would run, run here with the variables that it sets: two processes, one run directory."""
    data = uneven_data(tmp_path, 8, 4)
    recipe = recipe_file(tmp_path, make_chat_model(tmp_path / "base"), data, quantize="none", steps=2)
    text = rendered(kind, recipe, 1, 2)
    if kind == "slurm":
        line = text
    elif kind == "skypilot":
        line = yaml.safe_load(text)["run"]
    else:
        *_, job = yaml.safe_load_all(text)
        holder = job["spec"]["trainer"] if kind == "kubeflow" else job["spec"]["template"]["spec"]["containers"][0]
        (line,) = holder["args"]
        line = line.replace("/recipe/recipe.yaml", str(recipe)).replace("/work", str(tmp_path))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, content in STUBS.items():
        (tools / name).write_text(f"#!/bin/sh\n{content}\n")
        (tools / name).chmod(0o755)
    port = launched(1)[0]["MASTER_PORT"]
    line = line.replace("29400", port)
    cluster = {
        "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NUM_GPUS_PER_NODE": "2",
        "JOB_COMPLETION_INDEX": "0",
    }  # fmt: skip
    if kind == "kubeflow":
        cluster |= {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_MASTER_PORT": port}
        cluster |= {"PET_MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **cluster, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "runs/run\n"), done.stderr
    loop = Run(tmp_path / "runs" / "run").record.loop
    assert loop is not None and loop.processes == 2
