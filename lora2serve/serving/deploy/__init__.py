"""Servers and routes on other machines, rendered from exports and from versions of a registry.

One module per kind, each with ``header(spec)``, the comment on top, and ``documents(spec)``, what the YAML is made of.
Kinds of ``ROUTES`` take a RouteSpec: they start no server, they say which of the versions that are served answers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

from lora2serve.serving.deploy.route_spec import RouteSpec
from lora2serve.serving.deploy.server_spec import ServerSpec, gather
from lora2serve.serving.deploy.yaml_documents import UNTRIED, as_yaml

__all__ = ["EXPERIMENTAL", "KINDS", "ROUTES", "DeployKind", "RouteSpec", "ServerSpec", "gather", "render"]

DeployKind = Literal["compose", "k8s", "production-stack", "kserve", "ray", "llm-d", "argo", "litellm"]
KINDS: tuple[DeployKind, ...] = get_args(DeployKind)
ROUTES: tuple[DeployKind, ...] = ("llm-d", "argo", "litellm")
EXPERIMENTAL: dict[DeployKind, str] = dict.fromkeys(("production-stack", "kserve", "ray", "llm-d", "argo"), UNTRIED)


def render(kind: DeployKind, *specs: ServerSpec | RouteSpec) -> str:
    """YAML documents of one kind, under a comment that says how they are used."""
    module = import_module(f"lora2serve.serving.deploy.{kind.replace('-', '_')}")
    notes = [EXPERIMENTAL[kind]] if kind in EXPERIMENTAL else []
    lines = dict.fromkeys(line for spec in specs for line in module.header(spec))
    documents = [document for spec in specs for document in module.documents(spec)]
    return as_yaml([*notes, *lines], documents)
