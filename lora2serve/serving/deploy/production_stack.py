"""The vLLM production-stack's operator: a VLLMRuntime, and a LoraAdapter for each adapter."""

from __future__ import annotations

from typing import Any

from lora2serve.serving.deploy.k8s import stored
from lora2serve.serving.deploy.server_spec import MODELS, PORT, ServerSpec, label

API = "production-stack.vllm.ai/v1alpha1"
# The operator starts /opt/venv/bin/vllm, so the image must be one of the stack's own.
IMAGE = {"registry": "docker.io", "name": "lmcache/vllm-openai:latest", "pullPolicy": "IfNotPresent"}
TAKEN = {"--tensor-parallel-size", "--max-loras", "--enable-lora"}  # the resource has fields for these


def header(facts: ServerSpec) -> list[str]:
    return [
        f"kubectl apply -f FILE, then fill the operator's claim {facts.name!r}: {', '.join(stored(facts))}",
        "the runtime takes no key from a Secret: let the gateway ask for one",
    ]


def documents(facts: ServerSpec) -> list[dict[str, Any]]:
    runtime = {
        "apiVersion": API,
        "kind": "VLLMRuntime",
        "metadata": {"name": facts.name, "labels": {"model": facts.name}},  # what baseModel below means
        "spec": {
            "model": {"modelURL": facts.model, "enableLoRA": bool(facts.adapters)},
            "vllmConfig": {
                "port": PORT, "v1": True, "enableChunkedPrefill": True, "enablePrefixCaching": True,
                "tensorParallelSize": facts.tensor, **({"maxLoras": len(facts.adapters)} if facts.adapters else {}),
                "extraArgs": _extra(facts),
                **({} if facts.local else {"env": [{"name": "HF_HOME", "value": f"{MODELS}/huggingface"}]}),
            },
            "deploymentConfig": {
                "replicas": 1, "deploymentStrategy": "Recreate", "image": IMAGE,
                "resources": {"gpu": str(facts.gpus), "gpuType": "nvidia.com/gpu"},
            },
            "storageConfig": {
                "enabled": True, "mountPath": MODELS, "size": facts.volume, "accessMode": "ReadWriteOnce",
            },
        },
    }  # fmt: skip
    return [runtime, *(_adapter(facts, name) for name in facts.adapters)]


def _adapter(facts: ServerSpec, name: str) -> dict[str, Any]:
    return {
        "apiVersion": API,
        "kind": "LoraAdapter",
        "metadata": {"name": label(f"{facts.name}-{name}")},
        "spec": {
            "baseModel": facts.name,
            "adapterSource": {"type": "local", "adapterName": name, "adapterPath": facts.adapter_path(name)},
            "loraAdapterDeploymentConfig": {"algorithm": "default"},
        },
    }


def _extra(facts: ServerSpec) -> list[str]:
    words, out = iter(facts.arguments(modules=False)), []
    for word in words:
        if word not in TAKEN:
            out.append(word)
        elif word != "--enable-lora":
            next(words)
    return out
