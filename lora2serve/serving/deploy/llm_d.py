"""llm-d and the Gateway API Inference Extension: an InferenceModelRewrite that splits a name over served models."""

from __future__ import annotations

from lora2serve.errors import UsageError
from lora2serve.serving.deploy.route_spec import RouteSpec
from lora2serve.serving.deploy.server_spec import Document, label

GROUP = "inference.networking.x-k8s.io"
POOLS = "inference.networking.k8s.io"


def header(route: RouteSpec) -> list[str]:
    return [f"{route.shares}; render it again after a promotion or a rollback; kubectl apply -f FILE"]


def documents(route: RouteSpec) -> list[Document]:
    if not route.pool:
        raise UsageError("--pool is missing", "`kubectl get inferencepools` names the one that serves the versions")
    rule = {
        "matches": [{"model": {"type": "Exact", "value": route.name}}],
        "targets": [{"modelRewrite": version.served, "weight": version.weight} for version in route.versions],
    }
    spec = {"poolRef": {"group": POOLS, "kind": "InferencePool", "name": route.pool}, "rules": [rule]}
    kind = {"apiVersion": f"{GROUP}/v1alpha2", "kind": "InferenceModelRewrite"}
    return [{**kind, "metadata": {"name": label(route.name)}, "spec": spec}]
