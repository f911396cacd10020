"""Plain Kubernetes: a volume claim, a Deployment that is ready when vLLM is, a Service."""

from __future__ import annotations

from lora2serve.serving.deploy.server_spec import IMAGE, MODELS, PORT, Document, ServerSpec
from lora2serve.serving.deploy.yaml_documents import SHARED_MEMORY, SHARED_MEMORY_MOUNT, labels


def header(spec: ServerSpec) -> list[str]:
    return [
        f"kubectl create secret generic {spec.name} --from-literal=VLLM_API_KEY=...",
        f"kubectl apply -f FILE, then fill the claim {spec.claim()!r}: {', '.join(stored(spec))}",
    ]


def stored(spec: ServerSpec) -> list[str]:
    """What must lie in the claim, by path."""
    paths = [*([spec.model] if spec.local else []), *(spec.adapter_path(name) for name in spec.adapters)]
    return [path.removeprefix(f"{MODELS}/") + "/" for path in paths] or ["nothing"]


def documents(spec: ServerSpec) -> list[Document]:
    named = labels(spec.name)
    selector = {"app.kubernetes.io/name": spec.name}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": spec.claim(), "labels": named},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": spec.volume}}},
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": spec.name, "labels": named},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": selector},
            "strategy": {"type": "Recreate"},  # a second replica would wait for the GPUs of the first
            "template": {"metadata": {"labels": named}, "spec": _pod(spec)},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": spec.name, "labels": named},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": spec.port, "targetPort": "http"}]},
    }
    return [claim, deployment, service]


def _pod(spec: ServerSpec) -> dict[str, object]:
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    hub = [{"name": "HF_HOME", "value": f"{MODELS}/huggingface"}, _secret(spec, "HF_TOKEN", optional=True)]
    container = {
        "name": "vllm",
        "image": IMAGE,
        "command": ["vllm", "serve"],
        "args": [spec.model, *spec.arguments(), "--host", "0.0.0.0", "--port", str(PORT)],
        "env": [
            _secret(spec, "VLLM_API_KEY"), {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
            *([] if spec.local else hub),
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": str(spec.gpus)}},
        "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {**health, "periodSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 15, "failureThreshold": 4},
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": bool(spec.local)},
            SHARED_MEMORY_MOUNT,
        ],
    }  # fmt: skip
    claim = {"claimName": spec.claim()}
    return {
        "enableServiceLinks": False,  # a service called vllm would set VLLM_PORT, which vLLM reads as its own
        "containers": [container],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": claim},
            SHARED_MEMORY,
        ],
    }


def _secret(spec: ServerSpec, key: str, *, optional: bool = False) -> dict[str, object]:
    reference = {"name": spec.name, "key": key, **({"optional": True} if optional else {})}
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}
