"""SkyPilot: a task, whose machines know each other by SKYPILOT_NODE_IPS."""

from __future__ import annotations

from lora2serve.errors import UsageError
from lora2serve.serving.deploy.jobs.job_spec import MASTER_PORT, JobSpec
from lora2serve.serving.deploy.yaml_documents import UNTRIED, as_yaml


def render(spec: JobSpec) -> str:
    """One document for ``sky launch``."""
    if not spec.gpu:
        raise UsageError("deploy train skypilot: --gpu names the GPU that is asked for", "such as --gpu H100")
    place = {
        "nnodes": '"$SKYPILOT_NUM_NODES"', "nproc-per-node": '"$SKYPILOT_NUM_GPUS_PER_NODE"',
        "node-rank": '"$SKYPILOT_NODE_RANK"', "master-addr": '"$first"', "master-port": str(MASTER_PORT),
    }  # fmt: skip
    lines = [
        UNTRIED,
        f"sky launch -c {spec.name} FILE, in this folder, which is copied there",
        *spec.needed(),
    ]
    if spec.nodes > 1:
        lines.append("several machines need a folder that they share: mount one, and begin in it")
    task = {
        "name": spec.name,
        "num_nodes": spec.nodes,
        "resources": {"accelerators": f"{spec.gpu}:{spec.gpus}"},
        "workdir": ".",
        "setup": f"{spec.install()}\n",
        "run": f'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n{spec.torchrun(spec.recipe, place)}\n',
    }
    return as_yaml(lines, [task], blocks=True)
