"""KServe's LLMInferenceService, which fetches the model and the adapters from the store and starts vLLM itself."""

from __future__ import annotations

import shlex

from lora2serve.exporting import bundle
from lora2serve.serving.deploy.k8s import stored
from lora2serve.serving.deploy.server_spec import Document, ServerSpec, label


def header(spec: ServerSpec) -> list[str]:
    return [f"fill the store {spec.store}: {', '.join(stored(spec))}; then kubectl apply -f FILE"]


def documents(spec: ServerSpec) -> list[Document]:
    """Versions that share a name are services of one group, in each of which the name is that version's."""
    adapters = [{"name": spec.route or name, "uri": spec.in_store(spec.adapter_path(name))} for name in spec.adapters]
    count = len(adapters)
    lora = {"lora": {"maxRank": spec.rank, "maxAdapters": count, "maxCpuAdapters": count, "adapters": adapters}}
    name = spec.served if adapters else spec.route or spec.served
    pod = {"containers": [_container(spec)]}
    service = {
        "model": {"uri": _address(spec), "name": name, **(lora if adapters else {})},
        "replicas": 1,
        "parallelism": {"tensor": spec.tensor, **({"pipeline": spec.pipeline} if spec.pipeline > 1 else {})},
        "router": {
            "route": {"group": label(spec.route), "weight": spec.weight} if spec.route else {},
            "gateway": {},
            "scheduler": {},
        },
        "template": pod,
        **({"worker": pod} if spec.pipeline > 1 else {}),  # each stage of the pipeline is a pod of its own
    }
    kind = {"apiVersion": "serving.kserve.io/v1alpha2", "kind": "LLMInferenceService"}
    return [{**kind, "metadata": {"name": label(spec.name)}, "spec": service}]


def _address(spec: ServerSpec) -> str:
    if spec.local:
        return spec.in_store(spec.model)
    return f"hf://{spec.model}" + (f":{spec.revision}" if spec.revision else "")


def _container(spec: ServerSpec) -> dict[str, object]:
    config = ["--config", f"/mnt/models/{bundle.CONFIG}"] if spec.settings else []
    extra = shlex.join([*config, *spec.engine_arguments])
    return {
        "name": "main",
        **({"env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": extra}]} if extra else {}),
        "resources": {"limits": {"nvidia.com/gpu": str(spec.tensor)}},
    }
