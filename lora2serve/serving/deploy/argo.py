"""Argo Rollouts: an AnalysisTemplate that asks Prometheus for the verdict of the gateway's trial."""

from __future__ import annotations

import json

from lora2serve.config.trial_gauge import PROMOTE, VERDICT, WORSE
from lora2serve.serving.deploy.route_spec import RouteSpec
from lora2serve.serving.deploy.server_spec import Document, label

PROMETHEUS = "http://prometheus-operated.monitoring:9090"  # where Prometheus' operator puts it; a Rollout may say other

UNDECIDED_LOOKS = 1_000_000


def header(route: RouteSpec) -> list[str]:
    return [
        f"kubectl apply -f FILE; a Rollout's analysis names the template {label(route.name)!r}, "
        "with the argument prometheus where that is elsewhere",
        "it goes on until the trial of the gateway is decided: for the challenger is success, against it failure",
    ]


def documents(route: RouteSpec) -> list[Document]:
    query = f"min({VERDICT}{{name={json.dumps(route.name)}}})"  # of several gateways, the first that sees it worse
    metric = {
        "name": "verdict",
        "interval": "10s",
        "successCondition": f"len(result) > 0 && result[0] == {PROMOTE}",
        "failureCondition": f"len(result) > 0 && result[0] == {WORSE}",
        "consecutiveSuccessLimit": 1,
        "failureLimit": 0,
        "inconclusiveLimit": UNDECIDED_LOOKS,  # else the first look at a trial that is not decided ends the analysis
        "provider": {"prometheus": {"address": "{{args.prometheus}}", "query": query}},
    }
    spec = {"args": [{"name": "prometheus", "value": PROMETHEUS}], "metrics": [metric]}
    kind = {"apiVersion": "argoproj.io/v1alpha1", "kind": "AnalysisTemplate"}
    return [{**kind, "metadata": {"name": label(route.name)}, "spec": spec}]
