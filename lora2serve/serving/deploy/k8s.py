"""Plain Kubernetes: a volume claim, a Deployment that is ready when vLLM is, a Service."""

from __future__ import annotations

from typing import Any

from lora2serve.serving.deploy.server_spec import IMAGE, MODELS, PORT, ServerSpec


def header(facts: ServerSpec) -> list[str]:
    return [
        f"kubectl create secret generic {facts.name} --from-literal=VLLM_API_KEY=...",
        f"kubectl apply -f FILE, then fill the claim {facts.claim()!r}: {', '.join(stored(facts))}",
    ]


def stored(facts: ServerSpec) -> list[str]:
    """What must lie in the claim, by path."""
    paths = [*([facts.model] if facts.local else []), *(facts.adapter_path(name) for name in facts.adapters)]
    return [path.removeprefix(f"{MODELS}/") + "/" for path in paths] or ["nothing"]


def documents(facts: ServerSpec) -> list[dict[str, Any]]:
    labels = {"app.kubernetes.io/name": facts.name, "app.kubernetes.io/managed-by": "lora2serve"}
    selector = {"app.kubernetes.io/name": facts.name}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": facts.claim(), "labels": labels},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": facts.volume}}},
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": facts.name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": selector},
            "strategy": {"type": "Recreate"},  # a second replica would wait for the GPUs of the first
            "template": {"metadata": {"labels": labels}, "spec": _pod(facts)},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": facts.name, "labels": labels},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": facts.port, "targetPort": "http"}]},
    }
    return [claim, deployment, service]


def _pod(facts: ServerSpec) -> dict[str, Any]:
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    hub = [{"name": "HF_HOME", "value": f"{MODELS}/huggingface"}, _secret(facts, "HF_TOKEN", optional=True)]
    container = {
        "name": "vllm",
        "image": IMAGE,
        "command": ["vllm", "serve"],
        "args": [facts.model, *facts.arguments(), "--host", "0.0.0.0", "--port", str(PORT)],
        "env": [
            _secret(facts, "VLLM_API_KEY"), {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
            *([] if facts.local else hub),
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": str(facts.gpus)}},
        "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {**health, "periodSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 15, "failureThreshold": 4},
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": bool(facts.local)},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }  # fmt: skip
    claim = {"claimName": facts.claim()}
    return {
        "enableServiceLinks": False,  # a service called vllm would set VLLM_PORT, which vLLM reads as its own
        "containers": [container],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": claim},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        ],
    }


def _secret(facts: ServerSpec, key: str, *, optional: bool = False) -> dict[str, Any]:
    reference = {"name": facts.name, "key": key, **({"optional": True} if optional else {})}
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}
