"""Servers on other machines, rendered from exports.

One module per kind, each with ``header(spec)``, the comment on top, and ``documents(spec)``, what the YAML is made of.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

from lora2serve.serving.deploy.server_spec import ServerSpec, gather

__all__ = ["EXPERIMENTAL", "KINDS", "DeployKind", "ServerSpec", "gather", "render"]

DeployKind = Literal["compose", "k8s", "production-stack", "kserve", "ray"]
KINDS: tuple[DeployKind, ...] = get_args(DeployKind)
EXPERIMENTAL: dict[DeployKind, str] = dict.fromkeys(
    ("production-stack", "kserve", "ray"), "experimental: checked against its schema, never run on a cluster"
)


def render(kind: DeployKind, spec: ServerSpec) -> str:
    """YAML documents of one kind, under a comment that says how they are used."""
    import yaml

    class NoAliasDumper(yaml.SafeDumper):
        """What occurs twice is written twice: anchors are hard to read and to edit."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    module = import_module(f"lora2serve.serving.deploy.{kind.replace('-', '_')}")
    notes = [EXPERIMENTAL[kind]] if kind in EXPERIMENTAL else []
    header = "".join(f"# {line}\n" for line in [*notes, *module.header(spec)])
    documents = module.documents(spec)
    return header + yaml.dump_all(documents, Dumper=NoAliasDumper, sort_keys=False, width=120, allow_unicode=True)
