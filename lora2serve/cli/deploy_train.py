"""``lora2serve deploy train``."""

from __future__ import annotations

import click

from lora2serve.cli.options import Command, complete_runs


@click.command(
    "deploy train",
    cls=Command,
    short_help="Print a job that trains a recipe on a cluster.",
    examples=[
        ("lora2serve deploy train slurm --nodes 2 --gpus 4 > train.sh", "lora2serve.yaml here, for sbatch"),
        ("lora2serve deploy train k8s legal.yaml --gpus 4 --store pvc://work > job.yaml", ""),
        ("lora2serve deploy train kubeflow legal.yaml --nodes 2 --gpus 4 > trainjob.yaml", "Kubeflow Trainer"),
        ("lora2serve deploy train skypilot legal.yaml --gpu H100 > task.yaml", "for sky launch"),
    ],
)
@click.argument("kind", metavar="KIND")
@click.argument("recipe", required=False, shell_complete=complete_runs)
@click.option("--nodes", type=int, default=1, show_default=True, help="Machines.")
@click.option("--gpus", type=int, default=1, show_default=True, help="GPUs of each machine: a process for each.")
@click.option("--gpu", metavar="NAME", help="skypilot: the GPU, such as H100.")
@click.option("--image", metavar="IMAGE", help="k8s, kubeflow: an image with torch.")
@click.option("--store", metavar="URL", help="k8s, kubeflow: the claim with data and runs (default: pvc://models).")
def deploy_train(
    kind: str, recipe: str | None, nodes: int, gpus: int, gpu: str | None, image: str | None, store: str | None
) -> None:  # fmt: skip
    """Print a job that trains RECIPE (default: lora2serve.yaml here), by one process for each GPU.

    KIND is k8s (a Job), kubeflow (a TrainJob of Trainer v2), slurm (a script for sbatch) or skypilot (a task). All
    processes train one run, into runs/<name> of a folder that the machines share. What lora2serve does there is what
    `torchrun ... -m lora2serve train` does; what runs where, and when, is up to the cluster.
    """
    from lora2serve import console
    from lora2serve.api.deploy_training import deploy_training

    console.result(
        deploy_training(kind, recipe, nodes=nodes, gpus=gpus, gpu=gpu, image=image, store=store)  # type: ignore[arg-type]
    )
