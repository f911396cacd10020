"""What passes between us and the process of llama.cpp's converter."""

from __future__ import annotations

from typing import Any, TypedDict


class Request(TypedDict):
    """What the parent tells of a model. ``specs``: name, shape and torch type of each of its tensors."""

    architecture: str
    folder: str
    projector: bool
    file_type: str
    pre: str | None  # as the user names the pre-tokenizer
    pre_by_rules: str | None  # as the parent knows it by its rules
    specs: list[tuple[str, tuple[int, ...], str]]


class Float32Values(TypedDict):
    """An array on its way to the parent."""

    shape: list[int]
    values: bytes | memoryview


class PlannedTensor(TypedDict, total=False):
    """A tensor of the file, and where its values come from: rows of the parent's tensors as they are (``straight``: the
    name of each, and where its rows begin), a computation on ``sources``, a ``constant``, or bytes as ``stored``.
    """

    name: str
    shape: list[int]
    type: str
    straight: list[tuple[str, int]]
    sources: list[str]
    constant: Float32Values
    stored: bytes | memoryview


class FilePlan(TypedDict):
    """Everything of the file but the data of its tensors. ``keys``: name, value, type, type of the elements."""

    architecture: str
    keys: list[tuple[str, Any, int, int | None]]
    tensors: list[PlannedTensor]
