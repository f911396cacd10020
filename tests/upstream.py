"""llama.cpp's own source tree, out of the llama-cpp-python source package: the oracle for the GGUF tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def llama_cpp_dir() -> Path:
    """The tree of the installed version: ``LLAMA_CPP_DIR``, or unpacked once into the user's cache."""
    if os.environ.get("LLAMA_CPP_DIR"):
        return Path(os.environ["LLAMA_CPP_DIR"])
    installed = version("llama-cpp-python")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora2serve"
    tree = cache / f"llama.cpp-{installed}"
    if not (tree / "conversion").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _unpack(installed, Path(temporary))
            try:
                next(Path(temporary).glob("*/vendor/llama.cpp")).rename(tree)
            except OSError:
                assert (tree / "conversion").is_dir()  # another process was faster
    return tree


def _unpack(installed: str, folder: Path) -> None:
    package = f"llama-cpp-python=={installed}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        package,
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
    ]
    subprocess.run([*command, "--dest", str(folder)], check=True, timeout=900)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
