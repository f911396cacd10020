"""Kubeflow Trainer 2.3: a TrainJob on its runtime torch-distributed, which tells torchrun who is who (PET_...)."""

from __future__ import annotations

from lora2serve.serving.deploy.jobs.job_spec import (
    RECIPE_FOLDER,
    WORK,
    JobSpec,
    environment,
    mounts,
    recipe_map,
    stored,
    volumes,
)  # fmt: skip
from lora2serve.serving.deploy.server_spec import Document
from lora2serve.serving.deploy.yaml_documents import UNTRIED, as_yaml, labels

RUNTIME = "torch-distributed"
CONTAINER = "node"  # of that runtime, and the name of its job


def render(spec: JobSpec) -> str:
    """ConfigMap and TrainJob."""
    lines = [UNTRIED, "kubectl apply -f FILE; kubectl get trainjob " + spec.name, stored(spec)]
    return as_yaml(lines, [recipe_map(spec), _train_job(spec)], blocks=True)


def _train_job(spec: JobSpec) -> Document:
    command = spec.torchrun(f"{RECIPE_FOLDER}/recipe.yaml", {})
    trainer = {
        "image": spec.image,
        "command": ["sh", "-c"],
        "args": [f"{spec.install()} && cd {WORK} && exec {command}"],
        "env": environment(),
        "numNodes": spec.nodes,
        "numProcPerNode": spec.gpus,
        "resourcesPerNode": {"limits": {"nvidia.com/gpu": spec.gpus}},
    }
    pod = {"volumes": volumes(spec), "containers": [{"name": CONTAINER, "volumeMounts": mounts()}]}
    job = {"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": "lora2serve.dev/deploy",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": spec.name, "labels": labels(spec.name)},
        "spec": {"runtimeRef": {"name": RUNTIME}, "trainer": trainer, "runtimePatches": [patch]},
    }
