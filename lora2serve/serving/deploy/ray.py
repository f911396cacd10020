"""Ray Serve LLM: the model and multi-LoRA from cloud storage; requests name ``MODEL:ADAPTER``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lora2serve.errors import UsageError
from lora2serve.exporting import bundle
from lora2serve.serving.deploy.k8s import stored
from lora2serve.serving.deploy.server_spec import MODELS, ServerSpec

CLOUD = ("s3://", "gs://", "abfss://", "azure://")


def header(facts: ServerSpec) -> list[str]:
    names = ", ".join(f"{facts.served}:{name}" for name in facts.adapters) or facts.served
    return [f"fill {facts.store}: {', '.join(stored(facts))}; then serve run FILE; models: {names}"]


def documents(facts: ServerSpec) -> list[dict[str, Any]]:
    if not facts.store.startswith(CLOUD) and (facts.adapters or facts.local):
        raise UsageError(
            f"--store {facts.store}: Ray Serve loads from {', '.join(CLOUD)} only",
            "name the place with --store, such as s3://bucket/models",
        )
    kwargs: dict[str, Any] = {"tensor_parallel_size": facts.tensor, "pipeline_parallel_size": facts.pipeline}
    config: dict[str, Any] = {
        "model_loading_config": {
            "model_id": facts.served,
            "model_source": facts.in_store(facts.model) if facts.local else facts.model,
        }
    }
    if facts.adapters:
        count = len(facts.adapters)
        place = facts.in_store(f"{MODELS}/{bundle.ADAPTERS}")
        config["lora_config"] = {"dynamic_lora_loading_path": place, "max_num_adapters_per_replica": count}
        kwargs |= {"enable_lora": True, "max_lora_rank": facts.rank, "max_loras": count}
    if facts.revision:
        kwargs["revision"] = facts.revision
    kwargs |= facts.settings
    config["engine_kwargs"] = {**kwargs, **dict(_keywords(facts.extra))}
    config["deployment_config"] = {"num_replicas": 1}
    application = {
        "name": facts.name,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }
    return [{"applications": [application]}]


def _keywords(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """vLLM's command-line arguments as its Python ones."""
    import yaml

    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, found, value = word[2:].partition("=")
            pairs.append((name, [value] if found else []))
        elif pairs and not word.startswith("-"):
            pairs[-1][1].append(word)
        else:
            raise UsageError(f"{word}: Ray Serve takes vLLM's arguments by their long names, such as --max-model-len N")
    for name, given in pairs:
        values = [yaml.safe_load(value) for value in given]
        if not values:
            yield name.removeprefix("no-").replace("-", "_"), not name.startswith("no-")
        else:
            yield name.replace("-", "_"), values[0] if len(values) == 1 else values
