"""The vLLM production-stack's operator: a VLLMRuntime, and a LoraAdapter for each adapter."""

from __future__ import annotations

from lora2serve.serving.deploy.k8s import stored
from lora2serve.serving.deploy.server_spec import MODELS, PORT, Document, ServerSpec, label

API = "production-stack.vllm.ai/v1alpha1"
# The operator starts /opt/venv/bin/vllm, so the image must be one of the stack's own.
IMAGE = {"registry": "docker.io", "name": "lmcache/vllm-openai:latest", "pullPolicy": "IfNotPresent"}
TAKEN = {"--tensor-parallel-size", "--max-loras", "--enable-lora"}  # the resource has fields for these


def header(spec: ServerSpec) -> list[str]:
    return [
        f"kubectl apply -f FILE, then fill the operator's claim {spec.name!r}: {', '.join(stored(spec))}",
        "the runtime cannot read a key from a Secret: let the gateway require one",
    ]


def documents(spec: ServerSpec) -> list[Document]:
    runtime = {
        "apiVersion": API,
        "kind": "VLLMRuntime",
        "metadata": {"name": spec.name, "labels": {"model": spec.name}},  # what baseModel below means
        "spec": {
            "model": {"modelURL": spec.model, "enableLoRA": bool(spec.adapters)},
            "vllmConfig": {
                "port": PORT, "v1": True, "enableChunkedPrefill": True, "enablePrefixCaching": True,
                "tensorParallelSize": spec.tensor, **({"maxLoras": len(spec.adapters)} if spec.adapters else {}),
                "extraArgs": _extra(spec),
                **({} if spec.local else {"env": [{"name": "HF_HOME", "value": f"{MODELS}/huggingface"}]}),
            },
            "deploymentConfig": {
                "replicas": 1, "deploymentStrategy": "Recreate", "image": IMAGE,
                "resources": {"gpu": str(spec.gpus), "gpuType": "nvidia.com/gpu"},
            },
            "storageConfig": {
                "enabled": True, "mountPath": MODELS, "size": spec.volume, "accessMode": "ReadWriteOnce",
            },
        },
    }  # fmt: skip
    return [runtime, *(_adapter(spec, name) for name in spec.adapters)]


def _adapter(spec: ServerSpec, name: str) -> dict[str, object]:
    return {
        "apiVersion": API,
        "kind": "LoraAdapter",
        "metadata": {"name": label(f"{spec.name}-{name}")},
        "spec": {
            "baseModel": spec.name,
            "adapterSource": {"type": "local", "adapterName": name, "adapterPath": spec.adapter_path(name)},
            "loraAdapterDeploymentConfig": {"algorithm": "default"},
        },
    }


def _extra(spec: ServerSpec) -> list[str]:
    words, out = iter(spec.arguments(modules=False)), []
    for word in words:
        if word not in TAKEN:
            out.append(word)
        elif word != "--enable-lora":
            next(words)
    return out
