"""Argo Rollouts: an AnalysisTemplate that asks Prometheus for the verdict of the gateway's trial of a version."""

from __future__ import annotations

import json

from lora2serve.errors import UsageError
from lora2serve.serving.deploy.route_spec import RouteSpec
from lora2serve.serving.deploy.server_spec import Document, label

PROMETHEUS = "http://prometheus-operated.monitoring:9090"  # where Prometheus' operator puts it; a Rollout may say other
VERDICT = "lora2serve_trial_verdict"  # the gateway's gauge: 1 once it is decided, and the label outcome says how
AGAINST = "rollback|stop-shadow"
UNDECIDED_LOOKS = 1_000_000


def header(route: RouteSpec) -> list[str]:
    return [
        f"the trial of {route.versions[0].reference}; kubectl apply -f FILE; a Rollout's analysis names the template "
        f"{label(route.name)!r}, with the argument prometheus where that is elsewhere",
        "it goes on until the trial of the gateway is decided: for the challenger is success, against it failure",
    ]


def documents(route: RouteSpec) -> list[Document]:
    if len(route.versions) > 1:
        raise UsageError(f"argo: {len(route.versions)} versions, expected the challenger alone", "NAME@challenger, say")
    metric = {
        "name": "verdict",
        "interval": "10s",
        "successCondition": "len(result) > 0 && result[0] == 1",
        "failureCondition": "len(result) > 0 && result[0] == -1",
        "consecutiveSuccessLimit": 1,
        "failureLimit": 0,
        "inconclusiveLimit": UNDECIDED_LOOKS,  # else the first look at a trial that is not decided ends the analysis
        "provider": {"prometheus": {"address": "{{args.prometheus}}", "query": _query(route)}},
    }
    spec = {"args": [{"name": "prometheus", "value": PROMETHEUS}], "metrics": [metric]}
    kind = {"apiVersion": "argoproj.io/v1alpha1", "kind": "AnalysisTemplate"}
    return [{**kind, "metadata": {"name": label(route.name)}, "spec": spec}]


def _query(route: RouteSpec) -> str:
    """-1 where any gateway decided against it, 1 where one decided for it, and nothing while none has."""
    number = route.versions[0].reference.rpartition("@")[2]
    trial = f"adapter={json.dumps(route.name)}, challenger={json.dumps(number)}"
    against, promoted = (f"{VERDICT}{{{trial}, outcome{test}}} == 1" for test in (f'=~"{AGAINST}"', '="promote"'))
    return f"-max({against}) or max({promoted})"
