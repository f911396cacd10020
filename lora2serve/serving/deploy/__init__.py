"""Servers on other machines, rendered from exports.

One file per kind, each with ``header(facts)``, the words on top, and ``documents(facts)``, what YAML is made of.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lora2serve.serving.deploy.server_spec import ServerSpec, gather

__all__ = ["KINDS", "ServerSpec", "gather", "render"]

KINDS = ("compose", "k8s", "production-stack", "kserve", "ray")


def render(kind: str, facts: ServerSpec) -> str:
    """YAML documents of one kind, under a comment that says how they are used."""
    import yaml

    class Plain(yaml.SafeDumper):
        """What occurs twice is written twice: anchors are hard to read and to edit."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    module = import_module(f"lora2serve.serving.deploy.{kind.replace('-', '_')}")
    words = "".join(f"# {line}\n" for line in module.header(facts))
    documents = module.documents(facts)
    return words + yaml.dump_all(documents, Dumper=Plain, sort_keys=False, width=120, allow_unicode=True)
