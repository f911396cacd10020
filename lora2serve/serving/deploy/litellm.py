"""LiteLLM's proxy: one name over several models of a vLLM, by weight."""

from __future__ import annotations

from lora2serve.errors import UsageError
from lora2serve.serving.deploy.route_spec import RoutedVersion, RouteSpec
from lora2serve.serving.deploy.server_spec import Document
from lora2serve.system.http import check_address


def header(route: RouteSpec) -> list[str]:
    return [f"{route.shares}; VLLM_API_KEY=... LITELLM_MASTER_KEY=sk-... litellm --config FILE"]


def documents(route: RouteSpec) -> list[Document]:
    if not route.upstream:
        raise UsageError("--upstream is missing", "the address of the vLLM that serves the versions: http://HOST:8000")
    if check_address(route.upstream).password is not None:
        raise UsageError("--upstream with a password: it would stand in the file", "the key goes into VLLM_API_KEY")
    return [
        {
            "model_list": [_model(route, version) for version in route.versions],
            "router_settings": {"routing_strategy": "simple-shuffle"},  # the one that goes by weight
            "general_settings": {"master_key": "os.environ/LITELLM_MASTER_KEY"},
        }
    ]


def _model(route: RouteSpec, version: RoutedVersion) -> dict[str, object]:
    return {
        "model_name": route.name,
        "litellm_params": {
            "model": f"hosted_vllm/{version.served}",
            "api_base": f"{route.upstream.rstrip('/').removesuffix('/v1')}/v1",
            "api_key": "os.environ/VLLM_API_KEY",
            "weight": version.weight,
        },
        "model_info": {"id": version.reference},
    }
