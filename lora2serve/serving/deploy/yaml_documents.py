"""What all YAML for other machines has: how it is written, and what the objects of Kubernetes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora2serve.console import printable
from lora2serve.serving.deploy.server_spec import Document

UNTRIED = "experimental: checked against its schema, never run on a cluster"
# memory that the processes of a container share, and where it is
SHARED_MEMORY: Document = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
SHARED_MEMORY_MOUNT: Document = {"name": "shm", "mountPath": "/dev/shm"}


def labels(name: str) -> dict[str, str]:
    """Of all objects of a server or a training."""
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "lora2serve"}


def comment(lines: Iterable[str]) -> str:
    """The first lines of a file. Each stays one, whatever path it names: behind an end of line a shell would run it."""
    return "".join(f"# {printable(line, line_ends=False)}\n" for line in lines)


def as_yaml(lines: Iterable[str], documents: Sequence[Document], *, blocks: bool = False) -> str:
    """Documents under a comment. ``blocks``: texts of several lines, such as scripts, stay readable."""
    import yaml

    class NoAliasDumper(yaml.SafeDumper):
        """What occurs twice is written twice: anchors are hard to read and to edit."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    if blocks:
        NoAliasDumper.add_representer(str, text)
    content = yaml.dump_all(documents, Dumper=NoAliasDumper, sort_keys=False, width=120, allow_unicode=True)
    return comment(lines) + content
