"""Whether an export can be made again here, byte for byte: by its options on record and the libraries that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lora2serve.artifacts import manifest as manifests
from lora2serve.artifacts.manifest import Manifest
from lora2serve.errors import Lora2ServeError
from lora2serve.exporting.settings_plan import options_again
from lora2serve.exporting.stream import CPU, cpu_kernels
from lora2serve.system.small_files import digest

LIBRARIES = ("torch", "llama-cpp-python", "gguf", CPU)  # what folds and quantizes


class NotRepeatable(Lora2ServeError):
    """It was made with something that is not here."""


def recorded_options(export: Path, manifest: Manifest) -> Any:
    """The target's options; NotRepeatable where a file that they name is gone."""
    options = options_again(manifest)
    recorded = manifest.unknown.get("imatrix")
    if isinstance(recorded, dict):
        path = Path(str(recorded.get("path")))
        if not path.is_file() or digest(path)["sha256"] != recorded.get("sha256"):
            raise NotRepeatable(f"the importance matrix is no longer there: {path}")
        options = replace(options, imatrix=path)
    elif "calibration" in manifest.unknown:
        raise NotRepeatable(f"{manifest.quant} was fitted to calibration data by llm-compressor")
    return options


def require_same_libraries(manifest: Manifest) -> None:
    """NotRepeatable where another version folded or quantized, or another kind of processor."""
    if manifest.options is None:
        raise NotRepeatable("it was made by an earlier version, which did not record with which options")
    here = {**manifests.versions(), CPU: cpu_kernels()}
    for name in LIBRARIES:
        there = manifest.versions.get(name)
        if there != here.get(name):
            raise NotRepeatable(f"it was made with {name} {there}, here is {here.get(name)}")
