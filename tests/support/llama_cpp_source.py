"""llama.cpp's own source, fetched once into the user's cache: its converter, real vocabularies, real chat templates.

The one way for tests to get it. It is an oracle: nothing of it is copied into this repository.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lora2serve.progress import Silent
from lora2serve.system.doctor import unpack_source_package


@cache
def llama_cpp_dir() -> Path:
    """The tree of the installed version: ``LLAMA_CPP_DIR``, or unpacked once into the user's cache."""
    return unpack_source_package(Silent())


@cache
def chat_templates() -> dict[str, str]:
    """The chat templates of about 70 published models, by their file's name without its suffix."""
    files = sorted((llama_cpp_dir() / "models" / "templates").glob("*.jinja"))
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


def vocabulary(name: str) -> Path:
    """The vocabulary of a published model (``qwen2``, ``llama-spm``, ...) as a GGUF file without tensors."""
    return llama_cpp_dir() / "models" / f"ggml-vocab-{name}.gguf"
