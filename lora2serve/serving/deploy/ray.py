"""Ray Serve LLM: the model and multi-LoRA from cloud storage; requests name ``MODEL:ADAPTER``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora2serve.errors import UsageError
from lora2serve.exporting import bundle
from lora2serve.serving.deploy.k8s import stored
from lora2serve.serving.deploy.server_spec import MODELS, Document, ServerSpec

CLOUD = ("s3://", "gs://", "abfss://", "azure://")


def header(spec: ServerSpec) -> list[str]:
    names = ", ".join(f"{spec.served}:{name}" for name in spec.adapters) or spec.served
    return [f"fill {spec.store}: {', '.join(stored(spec))}; then serve run FILE; models: {names}"]


def documents(spec: ServerSpec) -> list[Document]:
    if not spec.store.startswith(CLOUD) and (spec.adapters or spec.local):
        raise UsageError(
            f"--store {spec.store}: Ray Serve loads from {', '.join(CLOUD)} only",
            "give another --store, such as s3://bucket/models",
        )
    arguments: dict[str, object] = {"tensor_parallel_size": spec.tensor, "pipeline_parallel_size": spec.pipeline}
    config: dict[str, object] = {
        "model_loading_config": {
            "model_id": spec.served,
            "model_source": spec.in_store(spec.model) if spec.local else spec.model,
        }
    }
    if spec.adapters:
        count = len(spec.adapters)
        folder = spec.in_store(f"{MODELS}/{bundle.ADAPTERS}")
        config["lora_config"] = {"dynamic_lora_loading_path": folder, "max_num_adapters_per_replica": count}
        arguments |= {"enable_lora": True, "max_lora_rank": spec.rank, "max_loras": count}
    if spec.revision:
        arguments["revision"] = spec.revision
    arguments |= spec.settings
    config["engine_kwargs"] = {**arguments, **dict(_keywords(spec.engine_arguments))}
    config["deployment_config"] = {"num_replicas": 1}
    application = {
        "name": spec.name,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }
    return [{"applications": [application]}]


def _keywords(words: Sequence[str]) -> Iterator[tuple[str, object]]:
    """vLLM's command-line arguments as its Python ones."""
    import yaml

    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            pairs.append((name, [value] if separator else []))
        elif pairs and not word.startswith("-"):
            pairs[-1][1].append(word)
        else:
            raise UsageError(f"{word}: Ray Serve takes vLLM's arguments by their long names, such as --max-model-len N")
    for name, texts in pairs:
        values = [yaml.safe_load(text) for text in texts]
        if not values:
            yield name.removeprefix("no-").replace("-", "_"), not name.startswith("no-")
        else:
            yield name.replace("-", "_"), values[0] if len(values) == 1 else values
