"""What a rendering of a training needs to know: the recipe, how many machines and GPUs, where its files are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora2serve.serving.deploy.server_spec import Document
from lora2serve.serving.deploy.yaml_documents import SHARED_MEMORY, SHARED_MEMORY_MOUNT, labels

WORK = "/work"  # where the store is in a container: data and models of the recipe, and runs/
RECIPE_FOLDER = "/recipe"
MASTER_PORT = 29400
IMAGE = "pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime"


@dataclass(frozen=True)
class JobSpec:
    """One training. ``nodes`` machines with ``gpus`` each, a process for each GPU."""

    name: str  # of the objects: letters, digits and '-'
    recipe: str  # its path
    content: str  # of the recipe, every field filled in
    files: Sequence[str]  # what it names of this machine: data, models, adapters
    version: str  # of lora2serve
    nodes: int = 1
    gpus: int = 1
    gpu: str = ""  # its name, where the kind asks for one
    image: str = IMAGE
    claim: str = ""  # of the volume that is the store

    def install(self) -> str:
        """The command that makes lora2serve available where an image has torch only."""
        return f"pip install {shlex.quote(f'lora2serve[train]=={self.version}')}"

    def torchrun(self, recipe: str, options: Mapping[str, str]) -> str:
        """The launcher's command line; the values of ``options`` are for the shell."""
        words = [f"--{name} {value}" for name, value in options.items()]
        return " ".join(["torchrun", *words, "-m lora2serve train", shlex.quote(recipe)])

    def needed(self) -> list[str]:
        """A line that says what must be there beside the recipe."""
        return [f"must be there: {', '.join(self.files)}"] if self.files else []


def recipe_map(spec: JobSpec) -> Document:
    """The recipe as Kubernetes keeps it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": spec.name, "labels": labels(spec.name)},
        "data": {"recipe.yaml": spec.content},
    }


def volumes(spec: JobSpec) -> list[Document]:
    """The store, the recipe, and memory that the processes of a machine share."""
    return [
        {"name": "work", "persistentVolumeClaim": {"claimName": spec.claim}},
        {"name": "recipe", "configMap": {"name": spec.name}},
        SHARED_MEMORY,
    ]


def mounts() -> list[Document]:
    """Where these are."""
    return [
        {"name": "work", "mountPath": WORK},
        {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
        SHARED_MEMORY_MOUNT,
    ]


def environment() -> list[Document]:
    """The Hub's cache is in the store; a token, where a secret has one."""
    token = {"name": "hf-token", "key": "HF_TOKEN", "optional": True}
    return [
        {"name": "HF_HOME", "value": f"{WORK}/huggingface"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}},
    ]


def stored(spec: JobSpec) -> str:
    """What the claim must hold."""
    files = ", ".join(spec.files) or "nothing"
    many = " (ReadWriteMany: several machines write there)" if spec.nodes > 1 else ""
    return f"the claim {spec.claim!r}{many} is {WORK}; of the recipe it must hold: {files}"
