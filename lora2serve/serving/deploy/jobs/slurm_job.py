"""Slurm: a batch script; srun starts torchrun once on each machine."""

from __future__ import annotations

from lora2serve.serving.deploy.jobs.job_spec import MASTER_PORT, JobSpec
from lora2serve.serving.deploy.yaml_documents import comment


def render(spec: JobSpec) -> str:
    """For ``sbatch``, in the folder that the recipe's paths are relative to, and that all machines share."""
    options = {
        "job-name": spec.name, "nodes": str(spec.nodes), "ntasks-per-node": "1", "gpus-per-node": str(spec.gpus),
        "output": f"{spec.name}-%j.log",
    }  # fmt: skip
    place = {
        "nnodes": '"$SLURM_JOB_NUM_NODES"', "nproc-per-node": str(spec.gpus), "rdzv-id": '"$SLURM_JOB_ID"',
        "rdzv-backend": "c10d", "rdzv-endpoint": f'"$first:{MASTER_PORT}"',
    }  # fmt: skip
    lines = [
        "never run on a cluster; sbatch FILE, in a folder that all machines share and an environment with",
        f"lora2serve {spec.version}; a partition, an account and a time limit are the site's own",
        *spec.needed(),
    ]
    directives = "".join(f"#SBATCH --{name}={value}\n" for name, value in options.items())
    return (
        f"#!/bin/bash\n{comment(lines)}{directives}\nset -euo pipefail\n"
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        f"srun {spec.torchrun(spec.recipe, place)}\n"
    )
