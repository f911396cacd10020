"""YAML from elsewhere, within bounds.

PyYAML's time grows with the square of the nesting (200 kB of brackets take half a minute), and a few lines of anchors
stand for more values than any memory holds. Both are refused here, before a value is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yaml import Node, Token

LONGEST = 1 << 20  # characters
DEEPEST = 50
MOST = 1_000_000  # values, each alias counted as what it stands for
FRONT_MATTER = re.compile(r"\s*---(?:\r\n?|\n)(.*?)(?:\r\n?|\n)---[ \t]*(?:\r?\n|$)", re.DOTALL)


def load_yaml(text: str) -> object:
    """What a document says; ValueError in one line for what is no YAML, beyond the bounds, or holds itself."""
    node = compose_yaml(text)
    if node and _values(node, {}, of_itself=MOST + 1) > MOST:
        raise ValueError("an anchor that holds itself")
    return construct(node)


def construct(node: Node | None) -> object:
    """What a composed document says; one that holds itself gives a value that does. ValueError as of ``load_yaml``."""
    import yaml

    loader = yaml.SafeLoader("")
    try:
        value: object = loader.construct_document(node) if node else None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # dates and numbers out of range, too
        raise ValueError(" ".join(str(error).split())[:300]) from None
    finally:
        loader.dispose()
    return value


def compose_yaml(text: str) -> Node | None:
    """A document as nodes; None where it is empty. ValueError for what is no YAML or beyond the bounds."""
    import yaml

    class Bounded(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Node | None, index: int) -> Node | None:
            if self.depth == DEEPEST:
                raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def fetch_flow_collection_start(self, kind: type[Token]) -> None:
            if self.flow_level == DEEPEST:  # before a thousand brackets are read ahead, each compared with all others
                raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
            super().fetch_flow_collection_start(kind)

    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters, expected {LONGEST} at most")
    try:
        loader = Bounded(text)
        try:
            node: Node | None = loader.get_single_node()
        finally:
            loader.dispose()
        if node and _values(node, {}, of_itself=1) > MOST:
            raise yaml.YAMLError(f"its anchors make more than {MOST} values")
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    return node


def front_matter(card: str) -> Mapping[object, object]:
    """The YAML at the head of a model card; empty where there is none. ValueError as of ``load_yaml``."""
    match = FRONT_MATTER.match(card)
    content = load_yaml(match[1]) if match else None
    if not isinstance(content, dict | None):
        raise ValueError(f"a {type(content).__name__} at the head of the card, expected keys and values")
    return content or {}


def _values(node: Node, counted: dict[int, int], of_itself: int) -> int:
    """How many values the node stands for, those of its aliases included; ``of_itself`` in a node that holds itself."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = of_itself  # while it is counted
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_values(part, counted, of_itself) for part in parts)
    return counted[id(node)]
