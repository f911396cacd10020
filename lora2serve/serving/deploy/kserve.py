"""KServe's LLMInferenceService, which fetches the model and the adapters from the store and starts vLLM itself."""

from __future__ import annotations

import shlex
from typing import Any

from lora2serve.exporting import bundle
from lora2serve.serving.deploy.k8s import stored
from lora2serve.serving.deploy.server_spec import ServerSpec


def header(facts: ServerSpec) -> list[str]:
    return [f"fill the store {facts.store}: {', '.join(stored(facts))}; then kubectl apply -f FILE"]


def documents(facts: ServerSpec) -> list[dict[str, Any]]:
    adapters = [{"name": name, "uri": facts.in_store(facts.adapter_path(name))} for name in facts.adapters]
    count = len(adapters)
    lora = {"lora": {"maxRank": facts.rank, "maxAdapters": count, "maxCpuAdapters": count, "adapters": adapters}}
    pod = {"containers": [_container(facts)]}
    spec = {
        "model": {"uri": _address(facts), "name": facts.served, **(lora if adapters else {})},
        "replicas": 1,
        "parallelism": {"tensor": facts.tensor, **({"pipeline": facts.pipeline} if facts.pipeline > 1 else {})},
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": pod,
        **({"worker": pod} if facts.pipeline > 1 else {}),  # each stage of the pipeline is a pod of its own
    }
    name = {"name": facts.name}
    return [{"apiVersion": "serving.kserve.io/v1alpha2", "kind": "LLMInferenceService", "metadata": name, "spec": spec}]


def _address(facts: ServerSpec) -> str:
    if facts.local:
        return facts.in_store(facts.model)
    return f"hf://{facts.model}" + (f":{facts.revision}" if facts.revision else "")


def _container(facts: ServerSpec) -> dict[str, Any]:
    config = ["--config", f"/mnt/models/{bundle.CONFIG}"] if facts.settings else []
    extra = shlex.join([*config, *facts.extra])
    return {
        "name": "main",
        **({"env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": extra}]} if extra else {}),
        "resources": {"limits": {"nvidia.com/gpu": str(facts.tensor)}},
    }
