"""``lora2serve.deploy_training``: a training as a job of another machine or a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lora2serve import __version__
from lora2serve.config import recipe as recipes
from lora2serve.config.arguments import checked
from lora2serve.config.recipe import Recipe
from lora2serve.errors import UsageError
from lora2serve.serving.deploy.jobs import JobKind, JobSpec, render_job
from lora2serve.serving.deploy.jobs.job_spec import IMAGE
from lora2serve.serving.deploy.server_spec import STORE, claim_of, label

OF_KIND = {"image": ("k8s", "kubeflow"), "store": ("k8s", "kubeflow"), "gpu": ("skypilot",)}

FORMS = {  # of values that go into a job as they stand
    "gpu": (r"[A-Za-z0-9][\w.-]*", "the name of a GPU, such as H100; --gpus says how many"),
    "image": (r"[A-Za-z0-9][\w.:/@-]*", "an image, such as registry/name:tag"),
}


@checked
def deploy_training(
    kind: JobKind, recipe: str | Path | None = None, *,
    nodes: int = 1, gpus: int = 1, gpu: str | None = None, image: str | None = None, store: str | None = None,
) -> str:  # fmt: skip
    """A job that trains ``recipe`` (``lora2serve.yaml`` here by default) by one process for each GPU.

    kind: "k8s" is an indexed Job, "kubeflow" a TrainJob of Trainer v2, "slurm" a script for sbatch, "skypilot" a task.
    nodes, gpus: machines, and GPUs of each.
    gpu: for skypilot, the GPU's name, such as "H100".
    image, store: for k8s and kubeflow, an image with torch, and the volume claim with data and runs, ``pvc://CLAIM``.

    Raises RecipeError for what is wrong with the recipe, and UsageError for what a kind has no use for.
    """
    problems = list(_problems(kind, {"gpu": gpu, "image": image, "store": store}, nodes, gpus))
    file = recipes.find(str(recipe) if recipe else None)
    loaded = recipes.load(file)
    rows = loaded.train.batch_size * loaded.train.accumulation
    if nodes > 0 < gpus and rows % (nodes * gpus):
        problems.append(f"train.batch_size times accumulation: {rows} rows a step, for {nodes * gpus} processes")
    if problems:
        raise UsageError("\n".join(problems), "see `lora2serve deploy train --help`")
    spec = JobSpec(
        name=label(loaded.name), recipe=str(file), content=recipes.dump(loaded), files=tuple(_local_files(loaded)),
        version=__version__, nodes=nodes, gpus=gpus, gpu=gpu or "", image=IMAGE if image is None else image,
        claim=claim_of(STORE if store is None else store),
    )  # fmt: skip
    return render_job(kind, spec).rstrip("\n")


def _problems(kind: str, given: dict[str, str | None], nodes: int, gpus: int) -> Iterator[str]:
    for option, value in given.items():
        if value is None:
            continue
        if kind not in OF_KIND[option]:
            yield f"--{option}: deploy train {kind} has no use for it, it is for {', '.join(OF_KIND[option])}"
        elif option in FORMS and not re.fullmatch(FORMS[option][0], value, re.ASCII):
            yield f"--{option} {value!r}: expected {FORMS[option][1]}"
    for option, count in (("nodes", nodes), ("gpus", gpus)):
        if count < 1:
            yield f"--{option} {count}: expected at least 1"


def _local_files(recipe: Recipe) -> Iterator[str]:
    """What the recipe names of this machine."""
    names = [source.path for part in ("train", "eval") for source in recipe.data.sources(part)]
    names += [recipe.model.path, *recipe.evaluate.suites]
    names += filter(None, (recipe.train.from_adapter, recipe.data.chat_template))
    return (name for name in dict.fromkeys(names) if Path(name).exists())
