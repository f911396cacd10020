"""Adapters of a running vLLM: which there are, and how they come and go."""

from __future__ import annotations

from pathlib import Path

from lora2serve.api.registered import exports_of
from lora2serve.serving import runtime_lora
from lora2serve.serving.runtime_lora import ServedModel

URL = "http://localhost:8000"


def list_adapters(url: str = URL) -> list[ServedModel]:
    """The adapters that the server has; EngineError where it does not answer."""
    return runtime_lora.list_adapters(url)


def add_adapter(name: str, export: str | Path, url: str = URL) -> Path:
    """Load an adapter export into the server under a name; the copy that it serves.

    Raises UsageError for what is not an adapter export, EngineError for what the server refuses.
    """
    return runtime_lora.add(url, name, exports_of([export], ("adapter",))[0])


def remove_adapter(name: str, url: str = URL) -> None:
    """Unload an adapter from the server; EngineError for what it refuses."""
    runtime_lora.remove(url, name)
