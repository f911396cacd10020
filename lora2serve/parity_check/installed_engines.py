"""Which engines can be asked on this machine, told without importing or starting one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from lora2serve.errors import Lora2ServeError
from lora2serve.parity_check.engine_process import EXTRAS, EngineMissing
from lora2serve.serving import ollama
from lora2serve.system.extras import install_hint

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "peft": ("torch", "transformers", "peft"),
    "transformers": ("torch", "transformers"),
    "vllm": ("vllm",),
    "vllm-server": ("vllm",),
    "llama.cpp": ("llama_cpp",),
}  # a server that runs needs none


@dataclass(frozen=True)
class EngineState:
    """``missing``: why it cannot be asked here, empty where it can; ``fix`` is the way out."""

    name: str
    missing: str = ""
    fix: str = ""


def engine_state(name: str) -> EngineState:
    """Of one engine; a server at an address of the user's is not asked."""
    absent = [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]
    if absent:
        return EngineState(name, f"{', '.join(absent)}: not installed", install_hint(EXTRAS[name]))
    if name == "ollama":
        try:
            ollama_version(ollama.OllamaClient())
        except Lora2ServeError as error:
            return EngineState(name, error.message, error.hint)
    return EngineState(name)


def ollama_version(client: ollama.OllamaClient) -> str:
    """That of a running server; EngineMissing where there is none."""
    try:
        return client.version()
    except ollama.NoServer as error:
        raise EngineMissing(f"not running: {error.message}", error.hint) from None
