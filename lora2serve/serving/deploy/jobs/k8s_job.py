"""Plain Kubernetes: an indexed Job with a pod for each machine, and a Service by which they find the first."""

from __future__ import annotations

from lora2serve.serving.deploy.jobs.job_spec import (
    MASTER_PORT,
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


def render(spec: JobSpec) -> str:
    """ConfigMap, Service (of several machines) and Job."""
    lines = [UNTRIED, "kubectl apply -f FILE; kubectl logs -f job/" + spec.name, stored(spec)]
    services = [_service(spec)] if spec.nodes > 1 else []
    return as_yaml(lines, [recipe_map(spec), *services, _job(spec)], blocks=True)


def _service(spec: JobSpec) -> Document:
    """Without an address of its own: each pod is NAME-INDEX.NAME, also before it is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": spec.name, "labels": labels(spec.name)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": spec.name},
            "ports": [{"name": "torchrun", "port": MASTER_PORT}],
        },
    }


def _job(spec: JobSpec) -> Document:
    several = spec.nodes > 1
    pod: dict[str, object] = {
        "restartPolicy": "Never",
        **({"subdomain": spec.name} if several else {}),
        "enableServiceLinks": False,
        "containers": [_container(spec)],
        "volumes": volumes(spec),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": spec.name, "labels": labels(spec.name)},
        "spec": {
            "completionMode": "Indexed",
            "completions": spec.nodes,
            "parallelism": spec.nodes,
            "backoffLimit": 0,  # a pod that is started again would begin a run of its own
            "template": {"metadata": {"labels": labels(spec.name)}, "spec": pod},
        },
    }


def _container(spec: JobSpec) -> Document:
    place = {"nproc-per-node": str(spec.gpus)}
    if spec.nodes > 1:
        place |= {
            "nnodes": str(spec.nodes), "node-rank": '"$JOB_COMPLETION_INDEX"',
            "master-addr": f"{spec.name}-0.{spec.name}", "master-port": str(MASTER_PORT),
        }  # fmt: skip
    command = spec.torchrun(f"{RECIPE_FOLDER}/recipe.yaml", place)
    return {
        "name": "train",
        "image": spec.image,
        "command": ["sh", "-c"],
        "args": [f"{spec.install()} && exec {command}"],
        "workingDir": WORK,
        "env": environment(),
        "resources": {"limits": {"nvidia.com/gpu": str(spec.gpus)}},
        "volumeMounts": mounts(),
    }
