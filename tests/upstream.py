"""llama.cpp's own source tree, out of the llama-cpp-python source package: the oracle for the GGUF tests."""

from __future__ import annotations

from pathlib import Path

from lora2serve.doctor import unpack_source_package
from lora2serve.progress import Silent


def llama_cpp_dir() -> Path:
    """The tree of the installed version: ``LLAMA_CPP_DIR``, or unpacked once into the user's cache."""
    return unpack_source_package(Silent())
